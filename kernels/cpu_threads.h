// Shares numbered tasks among threads.

#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <new>
#include <thread>
#include <vector>

namespace s2o {

// Runs tasks 0 to `tasks`, exclusive, handed out one by one in this order, on up to `threads` threads. `make` gives
// each thread a worker of its own, a function of a task's number. False when memory ran out. Threads live for one
// call, so that a process may fork between calls.
template <class Make>
bool on_threads(int64_t threads, int64_t tasks, const Make& make) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&]() {
    try {
      auto&& worker = make();
      for (int64_t task; !failed && (task = next++) < tasks;) worker(task);
    } catch (const std::bad_alloc&) {
      failed = true;
    }
  };
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min(threads, tasks); ++i) others.emplace_back(work);
  } catch (const std::exception&) {  // no more threads to be had: the work is done by those there are
  }
  work();
  for (std::thread& other : others) other.join();
  return !failed;
}

// The same for tasks that take microseconds, need no memory of their own and throw nothing: on the threads of OpenMP
// where the compiler has it, which are torch's own and awake. One thread leaves these alone; fewer of them than torch
// has would end the others.
template <class Work>
void on_team(int64_t threads, int64_t tasks, const Work& work) {
  if (threads < 2 || tasks < 2) {
    for (int64_t task = 0; task < tasks; ++task) work(task);
    return;
  }
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(static_cast<int>(threads))
  for (int64_t task = 0; task < tasks; ++task) work(task);
#else
  on_threads(threads, tasks, [&] { return [&](int64_t task) { work(task); }; });
#endif
}

}  // namespace s2o
