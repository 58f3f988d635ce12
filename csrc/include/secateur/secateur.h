// Includes the whole library.
#pragma once

#include <secateur/attention_scorer.h>
#include <secateur/compact.h>
#include <secateur/eliminate.h>
#include <secateur/error.h>
#include <secateur/moment_accumulator.h>
#include <secateur/runtime.h>
#include <secateur/select.h>
#include <secateur/tensor.h>
#include <secateur/unpack.h>
#include <secateur/value_similarity.h>
