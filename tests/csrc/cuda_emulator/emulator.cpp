// Blocks as fibers. Threads run from one wait to the next in ascending, descending or random order (EMULATOR_ORDER=0,
// 1, 2): a missing barrier shows as another result in at least one of them. Shared memory is filled with rubbish at the
// start of each block, and allocated to the byte, so that AddressSanitizer sees what lies outside.
#include "emulator.h"

#include <map>
#include <memory>
#include <random>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#error "the switch of stacks below is written for x86-64"
#endif

// saves the registers that a call preserves, and the stack pointer in *from; goes on with the stack `to`
extern "C" void emulator_switch(void** from, void* to);
asm(R"(
.text
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
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
)");

namespace emulator {
namespace {

constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedLimit = 48 << 10;  // what a kernel gets without asking for more
constexpr int kLanes = 32;

enum class State { ready, at_barrier, in_warp_op, done };

struct Fiber : Thread {
  State state = State::ready;
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
  WarpOp op{};
  uint64_t value = 0, result = 0;
  int argument = 0, width = 0;
  const void* where = nullptr;
};

std::vector<Fiber> fibers;
std::vector<std::unique_ptr<char[]>> stacks;
std::map<int, std::unique_ptr<char[]>> shared;
std::unique_ptr<char[]> dynamic_shared;
size_t shared_bytes = 0;
Fiber* current = nullptr;
void* scheduler = nullptr;
const std::function<void()>* kernel = nullptr;
const char* kernel_name = "";
std::mt19937 random_numbers(0);

int order() {
  const char* text = std::getenv("EMULATOR_ORDER");
  return text ? std::atoi(text) : 0;
}

#if defined(__SANITIZE_ADDRESS__)
const void* host_stack = nullptr;
size_t host_stack_bytes = 0;
#endif

void back_to_scheduler([[maybe_unused]] bool for_good) {
  Fiber& fiber = *current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fiber.fake_stack, host_stack, host_stack_bytes);
#endif
  emulator_switch(&fiber.stack_pointer, scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fiber.fake_stack, nullptr, nullptr);
#endif
}

void run() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &host_stack, &host_stack_bytes);
#endif
  (*kernel)();
  for (const auto& group : current->committed)
    if (!group.empty()) fail("a thread ends with copies in flight");
  if (!current->open.empty()) fail("a thread ends with copies that were never committed");
  current->state = State::done;
  back_to_scheduler(true);
}

void resume(Fiber& fiber) {
  current = &fiber;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  __sanitizer_start_switch_fiber(&fake_stack, fiber.stack, kStackBytes);
#endif
  emulator_switch(&scheduler, fiber.stack_pointer);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
  current = nullptr;
}

void start(Fiber& fiber, int64_t thread, int64_t block) {
  fiber = Fiber{};
  fiber.thread.x = static_cast<unsigned>(thread);
  fiber.block.x = static_cast<unsigned>(block);
  fiber.stack = stacks[thread].get();
  // six saved registers, the address to return to, and one word more, so that the stack is aligned as after a call
  void** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(fiber.stack + kStackBytes - 64) / 16 * 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(&run);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  fiber.stack_pointer = top;
}

// Completes the operation that all lanes of a warp have come to.
bool complete(Fiber* warp) {
  uint64_t votes = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (warp[lane].state != State::in_warp_op) return false;
    votes |= (warp[lane].value & 1) << lane;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    Fiber& f = warp[lane];
    if (f.where != warp[0].where || f.op != warp[0].op || f.width != warp[0].width)
      fail("a warp at several operations");
    const int first = lane / f.width * f.width;
    int from = lane;
    if (f.op == WarpOp::shuffle) from = first + f.argument % f.width;
    if (f.op == WarpOp::shuffle_up && lane - f.argument >= first) from = lane - f.argument;
    if (f.op == WarpOp::shuffle_xor) from = lane ^ f.argument;
    f.result = f.op == WarpOp::ballot ? votes : f.op == WarpOp::any ? votes != 0 : warp[from].value;
  }
  for (int lane = 0; lane < kLanes; ++lane) warp[lane].state = State::ready;
  return true;
}

void run_block(std::vector<int>& turn) {
  for (;;) {
    bool moved = false;
    if (order() == 2) std::shuffle(turn.begin(), turn.end(), random_numbers);
    for (const int t : turn) {
      if (fibers[t].state != State::ready) continue;
      moved = true;
      if (order() == 2 && random_numbers() % 4 == 0) continue;  // lets others run ahead
      resume(fibers[t]);
    }
    for (size_t first = 0; first < fibers.size(); first += kLanes) moved |= complete(&fibers[first]);
    if (moved) continue;
    size_t waiting = 0, done = 0;
    for (const Fiber& fiber : fibers) {
      waiting += fiber.state == State::at_barrier;
      done += fiber.state == State::done;
    }
    if (done == fibers.size()) return;
    if (waiting != fibers.size()) fail("a barrier, or a warp operation, that not all threads come to");
    for (Fiber& fiber : fibers) fiber.state = State::ready;
  }
}

char* rubbish(size_t bytes) {
  shared_bytes += bytes;
  if (shared_bytes > kSharedLimit) fail("more shared memory than a kernel gets");
  char* memory = new char[bytes];
  std::memset(memory, 0xA5, bytes);
  return memory;
}

}  // namespace

Thread& self() { return *current; }

void fail(const char* what) {
  std::fprintf(stderr, "%s: %s\n", kernel_name, what);
  std::abort();
}

void wait_for_block() {
  current->state = State::at_barrier;
  back_to_scheduler(false);
}

uint64_t wait_for_warp(WarpOp op, uint64_t value, int argument, int width, const void* where) {
  Fiber& fiber = *current;
  fiber.op = op;
  fiber.value = value;
  fiber.argument = argument;
  fiber.width = width;
  fiber.where = where;
  fiber.state = State::in_warp_op;
  back_to_scheduler(false);
  return fiber.result;
}

void* shared_memory(int declaration, size_t bytes) {
  auto& memory = shared[declaration];
  if (!memory) memory.reset(rubbish(bytes));
  return memory.get();
}

void* dynamic_shared_memory() { return dynamic_shared.get(); }

bool copies_are_early() {
  const char* text = std::getenv("EMULATOR_EARLY_COPIES");
  return text && *text == '1';
}

void launch(const char* name, int64_t blocks, int64_t threads, size_t dynamic_bytes,
            const std::function<void()>& body) {
  kernel = &body;
  kernel_name = name;
  if (blocks < 1 || blocks > INT32_MAX || threads < 1 || threads > 1024 || threads % kLanes != 0) fail("a bad launch");
  while (stacks.size() < static_cast<size_t>(threads)) stacks.emplace_back(new char[kStackBytes]);
  fibers.resize(threads);
  std::vector<int> turn(threads);
  std::iota(turn.begin(), turn.end(), 0);
  if (order() == 1) std::reverse(turn.begin(), turn.end());
  for (int64_t b = 0; b < blocks; ++b) {
    shared.clear();
    shared_bytes = 0;
    dynamic_shared.reset(rubbish(dynamic_bytes));
    const int64_t block = order() == 1 ? blocks - 1 - b : b;
    for (int64_t t = 0; t < threads; ++t) start(fibers[t], t, block);
    run_block(turn);
  }
}

}  // namespace emulator
