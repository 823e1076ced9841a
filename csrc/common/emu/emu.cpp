// The scheduler of the emulator: fibers, barriers, warp operations, shared memory.
#include "common/emu/emu.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifndef __x86_64__
#include <ucontext.h>
#endif

namespace effdet::emu {

thread_local uint3 thread_index, block_index;
thread_local dim3 block_size, grid_size;
thread_local std::uint64_t order = 0;
thread_local std::size_t shared_limit = 227 * 1024;

namespace {

constexpr std::size_t kStack = 256 * 1024;
constexpr std::size_t kZone = 64;        // around each array in shared memory
constexpr std::size_t kMostArrays = 64;  // in shared memory
constexpr std::size_t kSlot = 64;

struct Copy {
  void* to;
  const void* from;
  std::size_t bytes, zeros;
};

enum class State { kReady, kAtBarrier, kInWarp, kDone };

// Where execution continues; on x86-64 the stack pointer, below which the registers are.
#ifdef __x86_64__
using Context = void*;
#else
using Context = ucontext_t;
#endif

struct Fiber {
  Context context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  uint3 index{};
  State state = State::kReady;
  Where where{};
  const char* what = "";
  std::vector<Copy> copies;              // of the group that is not ended
  std::deque<std::vector<Copy>> groups;  // ended, not waited for
};

struct Warp {
  alignas(kSlot) unsigned char slots[2][kWarp *
                                        kSlot];  // of this operation, and of the one before, which some may still read
  unsigned char times[kWarp];                    // operations of each thread, modulo 2
  unsigned arrived = 0;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::unique_ptr<unsigned char, decltype(&std::free)> shared{nullptr, &std::free};
  std::size_t shared_bytes = 0, shared_size = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
};

thread_local Block* block = nullptr;
thread_local Fiber* running = nullptr;
thread_local Context scheduler;
thread_local void* scheduler_fake_stack = nullptr;
thread_local const void* scheduler_stack = nullptr;
thread_local std::size_t scheduler_stack_size = 0;

void enter();

// AddressSanitizer must know on which stack execution goes on.
void leaving(void** fake_stack, const void* stack, std::size_t size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, stack, size);
#else
  (void)fake_stack, (void)stack, (void)size;
#endif
}

void arrived(void* fake_stack, const void** from, std::size_t* size) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, from, size);
#else
  (void)fake_stack, (void)from, (void)size;
#endif
}

#ifdef __x86_64__
// Saves the registers that a call keeps on the stack, and the stack's address in *rdi; continues at rsi.
extern "C" void effdet_emu_switch(void** save, void* next);
asm(R"(
.text
.type effdet_emu_switch, @function
effdet_emu_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size effdet_emu_switch, .-effdet_emu_switch
)");

void change(Context* from, Context* to) {
  effdet_emu_switch(from, *to);
}

void prepare(Fiber& fiber) {
  auto top = reinterpret_cast<std::uintptr_t>(fiber.stack + kStack) & ~std::uintptr_t{63};
  auto* at = reinterpret_cast<void**>(top);
  *--at = nullptr;                              // keeps the stack aligned as after a call
  *--at = reinterpret_cast<void*>(&enter);      // where ret goes
  for (int i = 0; i < 6; ++i) *--at = nullptr;  // registers
  fiber.context = at;
}
#else
void change(Context* from, Context* to) {
  swapcontext(from, to);
}

void prepare(Fiber& fiber) {
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = kStack;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
}
#endif

void to_scheduler() {
  Fiber* self = running;
  leaving(self->state == State::kDone ? nullptr : &self->fake_stack, scheduler_stack, scheduler_stack_size);
  change(&self->context, &scheduler);
  arrived(self->fake_stack, nullptr, nullptr);
}

void enter() {
  arrived(nullptr, &scheduler_stack, &scheduler_stack_size);
  try {
    (*block->kernel)();
  } catch (...) {
    block->error = std::current_exception();
  }
  running->state = State::kDone;
  to_scheduler();
}

void resume(Fiber& fiber) {
  running = &fiber;
  thread_index = fiber.index;
  leaving(&scheduler_fake_stack, fiber.stack, kStack);
  change(&scheduler, &fiber.context);
  arrived(scheduler_fake_stack, nullptr, nullptr);
}

void wait(State state, const char* what, Where where) {
  Fiber* self = running;
  self->state = state;
  self->what = what;
  self->where = where;
  to_scheduler();
}

// Stacks are kept: a block has up to 1024 fibers.
unsigned char* stack_of(std::size_t fiber) {
  thread_local std::vector<unsigned char*> stacks;
  while (stacks.size() <= fiber) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stacks.push_back(static_cast<unsigned char*>(memory));
  }
  return stacks[fiber];
}

std::vector<unsigned> visits(std::size_t count, std::mt19937_64& random) {
  std::vector<unsigned> found(count);
  std::iota(found.begin(), found.end(), 0u);
  if (order == 1) std::reverse(found.begin(), found.end());
  if (order > 1) std::shuffle(found.begin(), found.end(), random);
  return found;
}

std::string place(Where where) {
  return std::string(where.file) + ":" + std::to_string(where.line);
}

std::string thread_name(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.index.x) + " of block (" + std::to_string(block_index.x) + ", " +
         std::to_string(block_index.y) + ", " + std::to_string(block_index.z) + ")";
}

// Ends a wait for the whole block, if all threads that are not done are at one barrier.
bool release_barrier(Block& b) {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : b.fibers) {
    if (fiber.state == State::kDone) continue;
    if (fiber.state != State::kAtBarrier) return false;
    if (first && (first->where.line != fiber.where.line || std::strcmp(first->where.file, fiber.where.file) != 0))
      throw std::runtime_error("threads of a block wait at different barriers: " + place(first->where) + " and " +
                               place(fiber.where));
    first = &fiber;
  }
  if (!first) return false;
  for (const Fiber& fiber : b.fibers)
    if (fiber.state == State::kDone)
      throw std::runtime_error(thread_name(fiber) + " ended before the barrier " + place(first->where));
  for (Fiber& fiber : b.fibers) fiber.state = State::kReady;
  return true;
}

void poison(const void* at, std::size_t bytes, bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
  forbidden ? __asan_poison_memory_region(at, bytes) : __asan_unpoison_memory_region(at, bytes);
#else
  (void)at, (void)bytes, (void)forbidden;
#endif
}

void run_block(Block& b, std::mt19937_64& random) {
  poison(b.shared.get(), b.shared_size, false);
  std::memset(b.shared.get(), 0xff, b.shared_size);  // a NaN in every type
  poison(b.shared.get(), b.shared_size, true);       // until a thread takes it
  for (std::size_t i = 0; i < b.fibers.size(); ++i) {
    Fiber& fiber = b.fibers[i];
    fiber.state = State::kReady;
    fiber.fake_stack = nullptr;
    fiber.copies.clear();
    fiber.groups.clear();
    poison(fiber.stack, kStack, false);
    prepare(fiber);
  }
  for (Warp& warp : b.warps) {
    std::memset(warp.times, 0, sizeof warp.times);
    warp.arrived = 0;
  }
  const auto warps = visits(b.warps.size(), random);
  const auto lanes = visits(kWarp, random);
  for (bool moved = true; moved;) {
    moved = false;
    for (unsigned warp : warps) {
      for (unsigned lane : lanes) {
        Fiber& fiber = b.fibers[warp * kWarp + lane];
        if (fiber.state != State::kReady) continue;
        moved = true;
        resume(fiber);
        if (b.error) std::rethrow_exception(b.error);
      }
    }
    if (!moved) moved = release_barrier(b);
  }
  for (const Fiber& fiber : b.fibers)
    if (fiber.state != State::kDone)
      throw std::runtime_error(thread_name(fiber) + " waits for others, which never come, in " + fiber.what + ", " +
                               place(fiber.where));
  for (const Fiber& fiber : b.fibers)
    if (!fiber.copies.empty() || !fiber.groups.empty())
      throw std::runtime_error(thread_name(fiber) + " ended before its asynchronous copies");
}

}  // namespace

void fail(const std::string& what, Where where) {
  throw std::runtime_error(what + ", at " + place(where));
}

void check_aligned(const void* address, std::size_t bytes, Where where) {
  if (reinterpret_cast<std::uintptr_t>(address) % bytes != 0)
    fail("a vector of " + std::to_string(bytes) + " bytes at a misaligned address", where);
}

void* take_shared(std::size_t before, std::size_t arrays, std::size_t bytes, Where where) {
  if (before + bytes > block->shared_bytes)
    fail("a block takes more shared memory than the " + std::to_string(block->shared_bytes) + " bytes of its launch",
         where);
  if (arrays >= kMostArrays) fail("too many arrays in shared memory", where);
  unsigned char* at = block->shared.get() + before + (arrays + 1) * kZone;
  poison(at, bytes, false);
  return at;
}

void barrier(Where where) {
  wait(State::kAtBarrier, "__syncthreads", where);
}

const unsigned char* exchange(const void* mine, std::size_t bytes, const char* what, Where where) {
  const unsigned number = thread_index.x / kWarp, mine_lane = thread_index.x % kWarp;
  Warp& warp = block->warps[number];
  unsigned char* slots = warp.slots[warp.times[mine_lane] & 1];
  warp.times[mine_lane] ^= 1;
  std::memcpy(slots + kSlot * mine_lane, mine, bytes);
  warp.arrived |= 1u << mine_lane;
  if (warp.arrived != ~0u) {
    wait(State::kInWarp, what, where);
    return slots;
  }
  warp.arrived = 0;
  for (unsigned lane = 0; lane < kWarp; ++lane) {
    Fiber& other = block->fibers[number * kWarp + lane];
    if (lane == mine_lane) continue;
    if (other.where.line != where.line || std::strcmp(other.where.file, where.file) != 0 ||
        std::strcmp(other.what, what) != 0)
      fail("threads of a warp are in different warp operations: " + std::string(what) + " and " + other.what + " at " +
               place(other.where),
           where);
    other.state = State::kReady;
  }
  return slots;
}

void begin_copy(void* to, const void* from, std::size_t bytes, std::size_t zeros, Where where) {
  check_aligned(to, bytes + zeros, where);
  if (bytes > 0) check_aligned(from, bytes + zeros, where);
  running->copies.push_back({to, from, bytes, zeros});
}

void end_copy_group() {
  running->groups.push_back(std::move(running->copies));
  running->copies.clear();
}

void wait_for_copies(int groups_left) {
  auto& groups = running->groups;
  while (groups.size() > static_cast<std::size_t>(groups_left)) {
    for (const Copy& copy : groups.front()) {
      auto* to = static_cast<unsigned char*>(copy.to);
      for (std::size_t i = 0; i < copy.bytes; ++i) to[i] = static_cast<const unsigned char*>(copy.from)[i];
      for (std::size_t i = 0; i < copy.zeros; ++i) to[copy.bytes + i] = 0;
    }
    groups.pop_front();
  }
}

void run(dim3 grid, dim3 size, std::size_t shared_bytes, const std::function<void()>& kernel) {
  const std::size_t threads = size.x;
  if (size.y != 1 || size.z != 1 || threads == 0 || threads % kWarp != 0 || threads > 1024)
    throw std::runtime_error("a block has 32 to 1024 threads in one dimension, whole warps");
  if (shared_bytes > shared_limit)
    throw std::runtime_error("a block takes " + std::to_string(shared_bytes) + " bytes of shared memory, there are " +
                             std::to_string(shared_limit));
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    throw std::runtime_error("a grid has 1 to 2^31 - 1 blocks in x, 65535 in y and z");
  Block b;
  b.fibers.resize(threads);
  b.warps.resize(threads / kWarp);
  b.kernel = &kernel;
  b.shared_bytes = shared_bytes;
  b.shared_size = shared_bytes + (kMostArrays + 1) * kZone;
  b.shared_size = (b.shared_size + kZone - 1) / kZone * kZone;
  b.shared.reset(static_cast<unsigned char*>(std::aligned_alloc(kZone, b.shared_size)));
  if (!b.shared) throw std::bad_alloc();
  for (std::size_t i = 0; i < threads; ++i) {
    b.fibers[i].stack = stack_of(i);
    b.fibers[i].index = {static_cast<unsigned>(i), 0, 0};
  }
  struct Restore {
    Block* before = block;
    ~Restore() {
      poison(block->shared.get(), block->shared_size, false);
      block = before;
    }
  } restore;
  block = &b;
  block_size = size;
  grid_size = grid;
  std::mt19937_64 random(order);
  const auto blocks = visits(std::size_t{grid.x} * grid.y * grid.z, random);
  for (unsigned number : blocks) {
    block_index = {number % grid.x, number / grid.x % grid.y, number / grid.x / grid.y};
    run_block(b, random);
  }
}

}  // namespace effdet::emu
