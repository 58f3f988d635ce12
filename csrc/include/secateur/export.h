/* SECATEUR_API marks the symbols that the library exports; all others are hidden. Also for C. */
#pragma once

#if defined(SECATEUR_STATIC)
#define SECATEUR_API
#elif defined(_WIN32)
#if defined(SECATEUR_BUILDING)
#define SECATEUR_API __declspec(dllexport)
#else
#define SECATEUR_API __declspec(dllimport)
#endif
#else
#define SECATEUR_API __attribute__((visibility("default")))
#endif
