// Runs the threads of a Metal kernel as fibers of one operating-system thread, so that a schedule
// is deterministic and a seed permutes it. A barrier parks a fiber; a simd-group operation parks 31
// lanes and the last one computes for all. Memory ends at inaccessible pages and starts as NaN.
#include "runtime.h"

#include <signal.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <vector>

#include "fiber.h"
#include "guarded.h"

namespace emu {

thread_local ThreadState* current = nullptr;

namespace {

constexpr size_t stack_size = 64 * 1024;
constexpr int lanes = 32;

enum class State : uint8_t { ready, at_barrier, at_simd, done };

struct Fiber {
  ThreadState thread;
  void* stack_pointer;
  char* stack = nullptr;
  State state;
  const char* what;
  int line;
  void* slot;
  const void* operation;
  Collective run;
  void* sanitizer = nullptr;
};

struct Variable {
  const void* key;
  Block block;
  std::string name;
  bool used;  // by the present threadgroup
};

// Everything about the launch in progress.
struct Scheduler {
  Launch* launch;
  std::vector<Fiber> fibers;
  std::vector<int> order;
  std::vector<Variable> variables;
  std::vector<char> simd_sync;
  std::vector<int> simd_turn;
  int count = 0, barrier_turn = 0;
  char barrier_sync[2], end_sync;
  void* stack_pointer = nullptr;
  void* sanitizer = nullptr;
  Fiber* running = nullptr;
  size_t memory_used = 0;
  uint64_t random;
  std::string error;

  bool orders(int flags) const { return flags & launch->sync_mask; }
  int shuffled(int n) {
    random = random * 6364136223846793005ull + 1442695040888963407ull;
    return int((random >> 33) % n);
  }
  void run_group(const uint32_t (&group)[3]);

 private:
  void prepare(const uint32_t (&group)[3]);
  void start(Fiber& fiber);
  void resume(Fiber& fiber);
  bool round();
  void resolve();
  void finish_barrier(int finished);
  std::string waiting() const;
};

thread_local Scheduler* scheduler = nullptr;
std::map<void*, Block> allocations;

// Back to the scheduler until it resumes this fiber.
void yield_fiber() {
  Fiber* fiber = scheduler->running;
  Sanitizer::enter(scheduler->sanitizer);
  emu_switch(&fiber->stack_pointer, scheduler->stack_pointer);
}

void fiber_main() {
  Scheduler* s = scheduler;
  s->launch->kernel(s->launch->buffers, s->running->thread);
  s->running->state = State::done;
  Sanitizer::release(&s->end_sync);
  yield_fiber();
  __builtin_unreachable();
}

std::string format(const char* text, auto... values) {
  char line[256];
  snprintf(line, sizeof line, text, values...);
  return line;
}

void on_bad_access(int number, siginfo_t* info, void*) {
  Scheduler* s = scheduler;
  if (!s || !s->running) {
    signal(number, SIG_DFL);
    return;
  }
  const char* address = (const char*)info->si_addr;
  const ThreadState& t = s->running->thread;
  std::string message = format("bad memory access by thread %u of threadgroup (%u, %u, %u)",
                               t.index, t.group[0], t.group[1], t.group[2]);
  for (const Variable& v : s->variables)
    if (v.block.contains(address))
      message += format(": threadgroup variable %s of %zu bytes at byte %td", v.name.c_str(),
                        v.block.size, address - v.block.data);
  for (int i = 0; i < s->launch->buffer_count; ++i) {
    const auto found = allocations.find(s->launch->buffers[i]);
    if (found != allocations.end() && found->second.contains(address))
      message += format(": buffer(%d) of %zu bytes at byte %td", i,
                        size_t(s->launch->sizes[i]), address - found->second.data);
  }
  fail(message);
}

void Scheduler::start(Fiber& fiber) {
  if (Sanitizer::on && fiber.stack) munmap(fiber.stack, stack_size), fiber.stack = nullptr;
  if (!fiber.stack) {
    fiber.stack = (char*)mmap(nullptr, stack_size, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    mprotect(fiber.stack, page, PROT_NONE);
  }
  fiber.state = State::ready;
  fiber.operation = nullptr;
  fiber.stack_pointer = initial_stack(fiber.stack + stack_size, fiber_main);
  if (fiber.sanitizer) Sanitizer::destroy(fiber.sanitizer);
  fiber.sanitizer = Sanitizer::create();
}

void Scheduler::prepare(const uint32_t (&group)[3]) {
  uint32_t size[3];
  for (int d = 0; d < 3; ++d)  // the last threadgroup of a grid may be smaller
    size[d] = std::min(launch->group[d], launch->grid[d] - group[d] * launch->group[d]);
  count = int(size[0] * size[1] * size[2]);
  if (int(fibers.size()) < count) fibers.resize(count);
  const uint32_t simd_groups = (count + lanes - 1) / lanes;
  simd_turn.assign(simd_groups, 0);
  simd_sync.assign(2 * simd_groups, 0);
  order.resize(count);
  barrier_turn = 0;
  memory_used = 0;
  if (Sanitizer::on) {  // fresh shadow memory for every threadgroup
    for (Variable& v : variables) v.block.release();
    variables.clear();
  }
  for (Variable& v : variables) v.used = false;
  for (int i = 0; i < count; ++i) {
    ThreadState& t = fibers[i].thread;
    const uint32_t at[3] = {i % size[0], i / size[0] % size[1], i / (size[0] * size[1])};
    for (int d = 0; d < 3; ++d) {
      t.position_in_group[d] = at[d];
      t.group[d] = group[d];
      t.position_in_grid[d] = group[d] * launch->group[d] + at[d];
      t.group_size[d] = size[d];
      t.grid_size[d] = launch->grid[d];
      t.groups[d] = (launch->grid[d] + launch->group[d] - 1) / launch->group[d];
    }
    t.index = i;
    t.simd_lane = i % lanes;
    t.simd_group = i / lanes;
    t.simd_groups = simd_groups;
    start(fibers[i]);
    order[i] = i;
  }
}

void Scheduler::resume(Fiber& fiber) {
  while (fiber.state == State::ready && error.empty()) {
    running = &fiber;
    current = &fiber.thread;
    Sanitizer::enter(fiber.sanitizer);
    emu_switch(&stack_pointer, fiber.stack_pointer);
    running = nullptr;
  }
}

// Let fibers run until they wait: all in turn (seed 0), all in random order (even seeds), or one
// simdgroup as far ahead of the others as it gets (odd seeds). False if none could run.
bool Scheduler::round() {
  bool any = false;
  for (int i = 0; i < count; ++i) any |= fibers[i].state == State::ready;
  if (!any) return false;
  if (launch->seed)
    for (int i = count - 1; i > 0; --i) std::swap(order[i], order[shuffled(i + 1)]);
  if (launch->seed % 2 == 0) {
    for (int i : order) resume(fibers[i]);
    return true;
  }
  const int groups = int(simd_turn.size()), first = order[0] / lanes;
  for (int g = 0; g < groups; ++g) {
    const int begin = (first + g) % groups * lanes, end = std::min(begin + lanes, count);
    for (bool ran = true; ran && error.empty();) {
      ran = false;
      for (int i = begin; i < end; ++i)
        if (fibers[i].state == State::ready) ran = true, resume(fibers[i]);
    }
  }
  return true;
}

// Where every fiber is, neighbours at the same place together.
std::string Scheduler::waiting() const {
  std::string text;
  for (int i = 0, j; i < count; i = j) {
    const Fiber& f = fibers[i];
    for (j = i + 1; j < count && fibers[j].state == f.state; ++j)
      if (f.state != State::done && (fibers[j].line != f.line || fibers[j].what != f.what)) break;
    text += f.state == State::done
                ? format("\n    threads %d..%d have returned", i, j - 1)
                : format("\n    threads %d..%d wait at %s, line %d", i, j - 1, f.what, f.line);
  }
  return text;
}

// Nobody can run: the barrier is complete, or the threads have diverged.
void Scheduler::resolve() {
  int parked = 0, finished = 0;
  for (int i = 0; i < count; ++i) {
    parked += fibers[i].state == State::at_barrier;
    finished += fibers[i].state == State::done;
  }
  if (parked + finished < count) error = "divergent simdgroup operation:" + waiting();
  else finish_barrier(finished);
}

void Scheduler::finish_barrier(int finished) {
  const Fiber& first = *std::find_if(fibers.begin(), fibers.end(), [](const Fiber& f) {
    return f.state == State::at_barrier;
  });
  for (int i = 0; i < count; ++i)
    if (fibers[i].state == State::at_barrier && fibers[i].line != first.line)
      error = "divergent threadgroup_barrier:" + waiting();
  if (finished) error = "threadgroup_barrier after some threads returned:" + waiting();
  if (!error.empty()) return;
  for (int i = 0; i < count; ++i) fibers[i].state = State::ready;
  barrier_turn++;
}

void Scheduler::run_group(const uint32_t (&group)[3]) {
  prepare(group);
  const auto alive = [this] {
    return std::any_of(fibers.begin(), fibers.begin() + count,
                       [](const Fiber& f) { return f.state != State::done; });
  };
  while (error.empty() && alive())
    if (!round()) resolve();
  launch->memory_used = std::max<uint64_t>(launch->memory_used, memory_used);
  if (!error.empty()) return;
  if (memory_used > launch->memory_limit)
    error = format("%zu bytes of threadgroup memory, the limit is %zu", memory_used,
                   size_t(launch->memory_limit));
  for (const Variable& v : variables)
    if (v.used && !v.block.intact()) error = "write before the start of " + v.name;
}

void* find_variable(const void* key, size_t size, const char* name, int line) {
  auto& variables = scheduler->variables;
  auto v = std::find_if(variables.begin(), variables.end(), [&](const Variable& other) {
    return other.key == key && other.block.size == size;
  });
  if (v == variables.end()) {
    variables.push_back({key, Block::reserve(size), format("%s, line %d", name, line), false});
    v = variables.end() - 1;
  }
  if (!v->used) {
    v->block.poison();
    v->used = true;
    scheduler->memory_used += (size + 15) / 16 * 16;
  }
  return v->block.data;
}

}  // namespace

void fail(const std::string& message) {
  scheduler->error = message;
  yield_fiber();
  __builtin_unreachable();
}

void* threadgroup_memory(const void* key, size_t size, size_t, const char* name, int line) {
  Sanitizer::quiet(true);
  void* data = find_variable(key, size, name, line);
  Sanitizer::quiet(false);
  if (scheduler->launch->sync_mask == 1) Sanitizer::ignore(data, size);
  Sanitizer::release(data);  // the allocation comes before every use
  Sanitizer::acquire(data);
  return data;
}

void threadgroup_barrier(int flags, const char* what, int line) {
  Scheduler* s = scheduler;
  Fiber* fiber = s->running;
  fiber->state = State::at_barrier;
  fiber->what = what;
  fiber->line = line;
  char* sync = &s->barrier_sync[s->barrier_turn % 2];
  if (s->orders(flags)) Sanitizer::release(sync);
  yield_fiber();
  if (s->orders(flags)) Sanitizer::acquire(sync);
}

void simd_collective(void* slot, Collective run, const void* operation, const char* what, int line,
                     int flags) {
  Scheduler* s = scheduler;
  Fiber* fiber = s->running;
  fiber->state = State::at_simd;
  fiber->slot = slot;
  fiber->run = run;
  fiber->operation = operation;
  fiber->what = what;
  fiber->line = line;
  const uint32_t group = fiber->thread.simd_group;
  char* sync = &s->simd_sync[2 * group + s->simd_turn[group] % 2];
  if (s->orders(flags)) Sanitizer::release(sync);
  const int begin = group * lanes, end = std::min(begin + lanes, s->count);
  const auto here = [&](const Fiber& f) {
    return f.state == State::at_simd && f.operation == operation && f.line == line;
  };
  const bool complete = std::all_of(&s->fibers[begin], &s->fibers[end - 1] + 1, here);
  if (complete) {
    void* slots[lanes] = {};
    for (int i = begin; i < end; ++i) {
      slots[i - begin] = s->fibers[i].slot;
      s->fibers[i].state = State::ready;
    }
    s->simd_turn[group]++;
    Sanitizer::quiet(true);
    if (run) run(slots);
    Sanitizer::quiet(false);
  } else {
    yield_fiber();
  }
  if (s->orders(flags)) Sanitizer::acquire(sync);
}

}  // namespace emu

extern "C" void* emu_allocate(size_t size) {
  const emu::Block block = emu::Block::reserve(size);
  emu::allocations[block.data] = block;
  return block.data;
}

extern "C" bool emu_free(void* data) {
  emu::Block block = emu::allocations.at(data);
  const bool intact = block.intact();
  block.release();
  emu::allocations.erase(data);
  return intact;
}

extern "C" int emu_launch(emu::Launch* launch) {
  using namespace emu;
  uint32_t groups[3];
  for (int d = 0; d < 3; ++d) {
    launch->group[d] = std::max(1u, std::min(launch->group[d], launch->grid[d]));
    groups[d] = (launch->grid[d] + launch->group[d] - 1) / launch->group[d];
  }
  Scheduler s{};
  s.launch = launch;
  s.random = launch->seed * 2654435761u + 1;
  s.sanitizer = Sanitizer::self();
  scheduler = &s;
  if (launch->sync_mask == 2)
    for (int i = 0; i < launch->buffer_count; ++i)
      Sanitizer::ignore(launch->buffers[i], launch->sizes[i]);

  // The handler never returns, which macOS does not notice on a signal stack: there it runs on the
  // fiber's own, and only an overflow of that stack goes unexplained.
#if defined(__APPLE__)
  const int on_stack = 0;
#else
  const int on_stack = SA_ONSTACK;
#endif
  std::vector<char> signal_stack(65536);
  stack_t stack{}, old_stack;
  stack.ss_sp = signal_stack.data();
  stack.ss_size = signal_stack.size();
  if (on_stack) sigaltstack(&stack, &old_stack);
  struct sigaction action{}, old_segv, old_bus;
  action.sa_sigaction = on_bad_access;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | on_stack;
  sigaction(SIGSEGV, &action, &old_segv);
  sigaction(SIGBUS, &action, &old_bus);

  const uint64_t total = uint64_t(groups[0]) * groups[1] * groups[2];
  std::vector<uint64_t> order(total);
  for (uint64_t i = 0; i < total; ++i) order[i] = i;
  if (launch->seed)
    for (uint64_t i = total - 1; i > 0; --i) std::swap(order[i], order[s.shuffled(int(i + 1))]);
  for (uint64_t i : order) {
    const uint32_t x = i % groups[0], y = i / groups[0] % groups[1];
    s.run_group({x, y, uint32_t(i / (uint64_t(groups[0]) * groups[1]))});
    if (!s.error.empty()) break;
  }
  Sanitizer::acquire(&s.end_sync);

  sigaction(SIGSEGV, &old_segv, nullptr);
  sigaction(SIGBUS, &old_bus, nullptr);
  if (on_stack) sigaltstack(&old_stack, nullptr);
  for (Fiber& f : s.fibers) {
    if (f.stack) munmap(f.stack, stack_size);
    if (f.sanitizer) Sanitizer::destroy(f.sanitizer);
  }
  for (Variable& v : s.variables) v.block.release();
  scheduler = nullptr;
  snprintf(launch->error, sizeof launch->error, "%s", s.error.c_str());
  return s.error.empty() ? 0 : 1;
}
