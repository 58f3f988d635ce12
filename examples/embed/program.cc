#include "program.h"

#include <cstdio>
#include <cstdlib>
#include <exception>

#include "safetensors.h"

namespace embed {
namespace {

/// Names out of a file may hold anything: one line of a bearable length, without control
/// characters.
std::string printable(std::string text) {
  constexpr std::size_t kLongest = 1000;
  if (text.size() > kLongest) text = text.substr(0, kLongest) + "...";
  for (char& c : text) {
    if (c < ' ' || c > '~') c = '?';
  }
  return text;
}

}  // namespace

const std::string& Words::value() {
  if (!left()) refuse(words_[next_ - 1], "a value", "none");
  return next();
}

double Words::number() {
  const std::string& option = words_[next_ - 1];
  const std::string& text = value();
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (text.empty() || *end != '\0') refuse(option, "a number", "'" + text + "'");
  return number;
}

std::int64_t Words::whole(std::int64_t most) {
  const std::string& option = words_[next_ - 1];
  const double number = this->number();
  const bool fits = number >= 1 && number <= static_cast<double>(most);
  const auto whole = fits ? static_cast<std::int64_t>(number) : 0;
  if (!fits || static_cast<double>(whole) != number) {
    refuse(option, "a whole number from 1 to " + std::to_string(most), words_[next_ - 1]);
  }
  return whole;
}

int run_program(const char* name, const std::function<void()>& program) try {
  program();
  return 0;
} catch (const std::exception& error) {
  std::fprintf(stderr, "%s: %s\n", name, printable(error.what()).c_str());
  return 1;
}

}  // namespace embed
