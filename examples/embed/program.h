// What all programs here share: their command line and the one line that says what was wrong.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

namespace embed {

/// The words of a command line, one after the other.
class Words {
 public:
  explicit Words(std::vector<std::string> words) : words_(std::move(words)) {}

  bool left() const { return next_ < words_.size(); }
  const std::string& next() { return words_[next_++]; }

  /// The word after the option that next() returned. Throws secateur::InvalidArgument, as all
  /// below.
  const std::string& value();
  double number();
  /// From 1 on.
  std::int64_t whole(std::int64_t most);

 private:
  std::vector<std::string> words_;
  std::size_t next_ = 0;
};

/// Returns the exit status of a program: 1 after an exception, which is one line on stderr.
int run_program(const char* name, const std::function<void()>& program);

}  // namespace embed
