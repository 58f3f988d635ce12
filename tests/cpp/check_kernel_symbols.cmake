# A kernel object defines one global symbol, its table, and no weak one: inline code compiled for a
# wide instruction set could be linked in place of the baseline's and crash older machines.
foreach(object IN LISTS OBJECTS)
  get_filename_component(kernel "${object}" NAME_WE)
  execute_process(COMMAND "${NM}" --extern-only --defined-only "${object}"
                  OUTPUT_VARIABLE symbols OUTPUT_STRIP_TRAILING_WHITESPACE
                  COMMAND_ERROR_IS_FATAL ANY)
  if(NOT symbols MATCHES "^[0-9a-f]+ [RD] [^ \n]*${kernel}_${ISA}[^ \n]*$")
    message(FATAL_ERROR "${object}: expected only ${kernel}_${ISA}, got:\n${symbols}")
  endif()
endforeach()
if(NOT OBJECTS)
  message(FATAL_ERROR "no objects of ${ISA} to check")
endif()
