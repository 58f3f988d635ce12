// An object that Python threads may share: calls release the GIL and take turns.
#pragma once

#include <pybind11/pybind11.h>

#include <algorithm>
#include <functional>
#include <mutex>
#include <utility>
#include <vector>

namespace secateur::python {

template <typename T>
class Guarded {
 public:
  template <typename... Args>
  explicit Guarded(Args&&... args) : object_(std::forward<Args>(args)...) {}
  Guarded(const Guarded&) = delete;
  Guarded(Guarded&&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  Guarded& operator=(Guarded&&) = delete;

  /// What no call changes (dims, name): no lock.
  const T& fixed() const { return object_; }

  /// function(object) without the GIL. Nobody waits for the lock while holding the GIL.
  template <typename Function>
  auto run(Function&& function) {
    const pybind11::gil_scoped_release release;
    const std::lock_guard<std::mutex> lock(mutex_);
    return function(object_);
  }

  /// function(object, other's object); other may be this one.
  template <typename Function>
  void run_with(Guarded& other, Function&& function) {
    if (&other == this) {
      run([&](T& object) { function(object, object); });
      return;
    }
    const pybind11::gil_scoped_release release;
    const std::scoped_lock lock(mutex_, other.mutex_);
    function(object_, other.object_);
  }

  /// References for the length of a call: whoever passed a list may empty it meanwhile.
  static std::vector<pybind11::object> held(const std::vector<Guarded*>& all) {
    std::vector<pybind11::object> objects;
    for (Guarded* one : all) {
      objects.push_back(pybind11::cast(one, pybind11::return_value_policy::reference));
    }
    return objects;
  }

  /// function(pointers to all objects), which are held. Locks are taken in one order, whatever that
  /// of the objects.
  template <typename Function>
  static void run_all(const std::vector<Guarded*>& all, Function&& function) {
    const pybind11::gil_scoped_release release;
    std::vector<Guarded*> order;
    std::vector<T*> objects;
    for (Guarded* one : all) {
      objects.push_back(one == nullptr ? nullptr : &one->object_);
      if (one != nullptr) order.push_back(one);
    }
    std::sort(order.begin(), order.end(), std::less<>());
    order.erase(std::unique(order.begin(), order.end()), order.end());
    std::vector<std::unique_lock<std::mutex>> locks;
    for (Guarded* one : order) locks.emplace_back(one->mutex_);
    function(objects);
  }

 private:
  T object_;
  std::mutex mutex_;
};

}  // namespace secateur::python
