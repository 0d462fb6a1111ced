// Runs CUDA kernels for Hopper on the CPU. Every CUDA thread is a fiber; CTAs start, and threads go on, in random
// order, from a seed. Asynchronous operations happen at a random later time: a bulk copy lands some steps after it was
// issued, sometimes very late; a wgmma runs as late as the kernel lets it (or, with `eager`, as early), the 16 rows of
// each warp separately, as one warp's wait does not cover the other three. Until then the accumulator and the copy's
// destination hold NaN, as does memory that was never written. So a missing wait shows in the results. Illegal programs
// end in an exception: a deadlock, misaligned addresses, registers touched while a wgmma uses them, a missing proxy
// fence.
//
// Proxy fences must be in the issuing thread (kernels/README.md): between the barrier that orders other threads' writes
// and its wgmma or bulk reduction, and before a bulk copy that overwrites what threads have read. A GPU would also
// accept a fence on the other side of the barrier.
//
// Not modelled: other memory ordering (all memory is sequentially consistent), time, and the tensor core's rounding.
#include "emulator.h"

#include <sys/mman.h>

#include <cstdarg>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <numeric>
#include <stdexcept>

namespace emulator {
namespace {

constexpr size_t kStackBytes = 192 * 1024;
constexpr size_t kSharedBytes = 228 * 1024;
constexpr int kSlowCopy = 1000;           // steps that a copy may take, long enough for several loops of a kernel
constexpr int kStepsOfDeadlock = 200000;  // steps of the scheduler in which nothing happens
constexpr uint32_t kPoison = 0x7fba7fba;  // a NaN, also as two halves

int concurrent_ctas = 1;
bool eager_wgmma = false;
uint64_t random_state = 1;
uint64_t now = 0;  // counts the events that proxy fences order

uint64_t random_number() {  // xorshift64
    random_state ^= random_state << 13;
    random_state ^= random_state >> 7;
    random_state ^= random_state << 17;
    return random_state;
}

struct Wgmma {
    Shape shape;
    std::vector<const uint32_t *> a;
    std::vector<uint32_t> a_at_issue;
    uint64_t a_descriptor, b_descriptor;
    std::vector<void *> d;
    bool accumulate;
    uint64_t fenced_at;
};
// When stmatrix last wrote some bytes of shared memory, when a bulk copy last filled them, and when a thread last read
// them. Only loads of `Observed` numbers are known; other bytes of a copy that no wgmma has read count as read by
// threads.
constexpr int kChunk = 16;
struct Chunk {
    uint64_t written_at = 0, filled_at = 0, loaded_at = 0;
    bool read_by_wgmma = false;
};

// Operands of a wgmma. All threads of a warpgroup must pass the same.
struct Issue {
    uint64_t a_descriptor, b_descriptor;
    bool accumulate;
    int n;

    bool operator==(const Issue &o) const {
        return a_descriptor == o.a_descriptor && b_descriptor == o.b_descriptor && accumulate == o.accumulate &&
               n == o.n;
    }
};

struct Cta;
struct Thread {
    Cta *cta = nullptr;
    int index = 0;
    bool done = true;
    char *stack = nullptr;
    void *stack_pointer = nullptr;
    std::deque<Wgmma> in_flight;
    uint64_t issued = 0;
    std::vector<uint64_t> groups;                  // wgmmas issued before each commit
    std::map<void *, std::vector<float>> results;  // accumulators in flight, by their first register
    uint64_t fenced_at = 0, acquired_at = 0;       // when it last fenced shared memory; when it last passed a barrier
    bool acquired_global = false;                  // passed a barrier and has not fenced global memory since
};

// Each of 32 lanes leaves a row of words; the last one to arrive does the work.
struct Meeting {
    uint32_t words[32][5], shared[32];
    int arrived = 0;
    uint64_t generation = 0;
};
struct CtaBarrier {
    int arrived = 0;
    uint64_t generation = 0;
};
struct Mbarrier {
    int arrivals = 0, pending = 0;
    bool fenced = false;  // visible to the copy engine
    long bytes = 0;
    uint32_t phase = 0;
};
struct Copy {
    char *to;
    const char *from;
    int bytes;
    void *barrier;            // null for a reduction to global memory
    Thread *issuer;           // may wait for the reduction
    long due;                 // earliest step of the CTA at which it can happen
    std::vector<float> read;  // a reduction reads its source first and adds later
};

struct Cta {
    uint3 index{};
    int live = 0;    // threads that have not ended
    long steps = 0;  // steps in which a thread ran
    char *memory = nullptr;
    std::vector<Thread> threads;
    CtaBarrier barrier;
    std::map<void *, Mbarrier> mbarriers;
    std::vector<Copy> copies;
    std::vector<Meeting> warps;
    std::vector<std::vector<Issue>> issued;  // by each warpgroup
    std::vector<uint64_t> executed;          // wgmmas of each warp
    std::vector<Chunk> chunks;               // of shared memory
};

std::vector<Cta> ctas;
Thread *current;
void *scheduler_stack_pointer;
std::function<void()> kernel_body;
std::exception_ptr kernel_error;
int idle_steps;

char *allocate(size_t bytes) {
    void *memory = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) {
        throw std::bad_alloc();
    }
    return static_cast<char *>(memory);
}

// Saves the callee-saved registers on this stack and its pointer in *save, and resumes the other stack.
extern "C" void emulator_switch(void **save, void *to);
asm(R"(
.text
.local emulator_switch
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

void thread_main() {
    try {
        kernel_body();
        if (!current->in_flight.empty()) {
            fail("a thread ends with wgmmas in flight");
        }
    } catch (...) {
        kernel_error = std::current_exception();
    }
    current->done = true;
    --current->cta->live;
    progress();
    yield();
}

void resume(Thread &thread) {
    current = &thread;
    threadIdx = {unsigned(thread.index), 0, 0};
    blockIdx = thread.cta->index;
    emulator_switch(&scheduler_stack_pointer, thread.stack_pointer);
    if (kernel_error != nullptr) {
        std::rethrow_exception(std::exchange(kernel_error, nullptr));
    }
}

void start(Cta &cta, uint3 index, int threads) {
    char *memory = cta.memory != nullptr ? cta.memory : allocate(kSharedBytes);
    std::vector<Thread> fibers = std::move(cta.threads);
    cta = Cta{};
    cta.index = index;
    cta.live = threads;
    cta.memory = memory;
    std::memset(memory, 0xff, kSharedBytes);
    cta.warps.resize(threads / 32);
    cta.issued.resize((threads + 127) / 128);
    cta.executed.resize(threads / 32);
    cta.chunks.resize(kSharedBytes / kChunk);
    fibers.resize(std::max(fibers.size(), size_t(threads)));
    cta.threads = std::move(fibers);
    for (int i = 0; i < threads; ++i) {
        char *stack = cta.threads[i].stack != nullptr ? cta.threads[i].stack : allocate(kStackBytes);
        Thread thread;
        thread.cta = &cta;
        thread.index = i;
        thread.done = false;
        thread.stack = stack;
        // The stack as emulator_switch leaves it: six registers, the address to go to, and a null return address.
        void **top = reinterpret_cast<void **>(stack + kStackBytes - 64);
        *--top = nullptr;
        *--top = reinterpret_cast<void *>(&thread_main);
        thread.stack_pointer = top - 6;
        cta.threads[i] = std::move(thread);
    }
}

// All 32 lanes leave `words`; the last one to arrive runs `work` on them; then all continue.
template <class Work>
Meeting &meet(const uint32_t *words, int count, Work work) {
    Meeting &meeting = current->cta->warps[current->index / 32];
    const uint64_t generation = meeting.generation;
    std::copy(words, words + count, meeting.words[current->index % 32]);
    if (++meeting.arrived == 32) {
        meeting.arrived = 0;
        ++meeting.generation;
        work(meeting);
    }
    while (meeting.generation == generation) {
        yield();
    }
    return meeting;
}

void publish(Meeting &meeting) {
    for (int lane = 0; lane < 32; ++lane) {
        meeting.shared[lane] = meeting.words[lane][0];
    }
}

Mbarrier &mbarrier_of(Cta &cta, void *barrier) {
    const auto found = cta.mbarriers.find(barrier);
    if (found == cta.mbarriers.end()) {
        fail("mbarrier used before its init");
    }
    return found->second;
}

void complete_phase(Mbarrier &barrier) {
    if (barrier.pending < 0) {
        fail("more arrivals on an mbarrier than it was initialised for");
    }
    if (barrier.pending == 0 && barrier.bytes == 0) {
        barrier.phase ^= 1;
        barrier.pending = barrier.arrivals;
        progress();
    }
}

// Earliest step of the copy engine's next operation: mostly this one, sometimes a much later one.
long due(const Cta &cta) {
    return cta.steps + (random_number() % 8 == 0 ? long(random_number() % kSlowCopy) : 0);
}

void land(Cta &cta, size_t which) {
    progress();
    if (Copy &reduction = cta.copies[which]; reduction.barrier == nullptr && reduction.read.empty()) {
        const float *from = reinterpret_cast<const float *>(reduction.from);
        reduction.read.assign(from, from + reduction.bytes / 4);
        reduction.due = due(cta);
        return;
    }
    const Copy copy = std::move(cta.copies[which]);
    cta.copies.erase(cta.copies.begin() + long(which));
    if (copy.barrier == nullptr) {
        for (size_t i = 0; i < copy.read.size(); ++i) {
            reinterpret_cast<float *>(copy.to)[i] += copy.read[i];
        }
        return;
    }
    std::memcpy(copy.to, copy.from, copy.bytes);
    const auto first = cta.chunks.begin() + (copy.to - cta.memory) / kChunk;
    std::fill(first, first + copy.bytes / kChunk, Chunk{0, ++now, 0, false});
    Mbarrier &barrier = mbarrier_of(cta, copy.barrier);
    barrier.bytes -= copy.bytes;
    complete_phase(barrier);
}

// A CTA may end before its additions to global memory happen, but not while the copy engine uses its shared memory.
void finish(Cta &cta) {
    while (!cta.copies.empty()) {
        if (cta.copies[0].barrier != nullptr || cta.copies[0].read.empty()) {
            fail("CTA %u ends while the copy engine uses its shared memory", cta.index.x);
        }
        land(cta, 0);
    }
}

// Shared-memory address of an element of a wgmma operand: row or column `mn`, index `k` of the sum. The fields are
// those of PTX's matrix descriptor.
uint32_t element_address(const Cta &cta, uint64_t descriptor, bool mn_major, int mn, int k, int bytes) {
    const uint32_t start = (descriptor & 0x3fff) << 4;
    const uint32_t leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    const int swizzle = descriptor >> 62 & 3;
    if ((descriptor >> 49 & 7) != 0 || (swizzle != 1 && swizzle != 2)) {
        fail("a matrix descriptor that the emulator does not know");
    }
    const int width = swizzle == 1 ? 128 : 64;
    uint32_t address = start;
    if (mn_major) {
        const int per_row = width / bytes;
        address += mn / per_row * leading + k / 8 * stride + k % 8 * width + mn % per_row * bytes;
    } else {
        address += mn / 8 * stride + mn % 8 * width + k * bytes;
    }
    address ^= (address >> 3) & (swizzle == 1 ? 0x70 : 0x30);
    if (address + bytes > kSharedBytes) {
        fail("wgmma reads beyond shared memory");
    }
    return address;
}

float e4m3(uint8_t x) {
    static const std::vector<float> values = [] {
        std::vector<float> all(256);
        for (int i = 0; i < 256; ++i) {
            all[i] = __half2float(__half(__nv_cvt_fp8_to_halfraw(uint8_t(i), __NV_E4M3)));
        }
        return all;
    }();
    return values[x];
}
float bf16(uint16_t x) {
    return bits<float>(uint32_t(x) << 16);
}

uint32_t &word(void *reg) {
    return *static_cast<uint32_t *>(reg);
}

// Element e of an accumulator's registers.
float element(const std::vector<void *> &d, const Shape &shape, int e) {
    return shape.fp16_sums ? __half2float(static_cast<const __half *>(d[e / 2])[e % 2])
                           : *static_cast<const float *>(d[e]);
}
void set_element(const std::vector<void *> &d, const Shape &shape, int e, float x) {
    if (shape.fp16_sums) {
        static_cast<__half *>(d[e / 2])[e % 2] = __float2half(x);
    } else {
        *static_cast<float *>(d[e]) = x;
    }
}

// Products of 16 rows, in fp32 or, exact for E4M3, in fp64.
template <class T>
void multiply(const float (&a)[16][32], const float (&b)[32][256], T (&product)[16][256], int n, int k) {
    for (int row = 0; row < 16; ++row) {
        std::fill(product[row], product[row] + n, T(0));
        for (int i = 0; i < k; ++i) {
            for (int column = 0; column < n; ++column) {
                product[row][column] += T(a[row][i]) * b[i][column];
            }
        }
    }
}

bool issued_by_all(const Cta &cta, int warpgroup, uint64_t number) {
    const auto first = cta.threads.begin() + warpgroup * 128;
    return std::all_of(first, first + 128, [&](const Thread &t) { return t.issued > number; });
}

// Runs a warp's first wgmma in flight. False when a thread of its warpgroup has not issued it yet.
bool execute(Cta &cta, int warp) {
    if (!issued_by_all(cta, warp / 4, cta.executed[warp])) {
        return false;
    }
    Thread *threads = &cta.threads[warp * 32];
    const Wgmma first = threads[0].in_flight.front();
    const Shape shape = first.shape;
    const int bytes = shape.fp8 ? 1 : 2, first_row = warp % 4 * 16;
    uint64_t fenced_at = first.fenced_at;
    for (int i = 1; i < 32; ++i) {
        fenced_at = std::min(fenced_at, threads[i].in_flight.front().fenced_at);
    }
    static float a[16][32], b[32][256], product[16][256];
    static double exact[16][256];
    // Calls set(mn, k, value) for an operand's rows or columns from `first_mn` on. Swizzles keep 16 bytes together.
    const auto read = [&](uint64_t descriptor, bool mn_major, int first_mn, int count, auto set) {
        const int per_chunk = kChunk / bytes;
        const int mn_step = mn_major ? per_chunk : 1, k_step = mn_major ? 1 : per_chunk;
        for (int mn = 0; mn < count; mn += mn_step) {
            for (int k = 0; k < shape.k; k += k_step) {
                const uint32_t address = element_address(cta, descriptor, mn_major, first_mn + mn, k, bytes);
                Chunk &chunk = cta.chunks[address / kChunk];
                chunk.read_by_wgmma = true;
                if (chunk.written_at > fenced_at) {
                    fail("a wgmma reads what threads wrote, without a proxy fence in between");
                }
                const char *from = cta.memory + address;
                for (int i = 0; i < per_chunk; ++i) {
                    uint16_t pair;
                    std::memcpy(&pair, from + i * bytes, bytes);
                    set(mn + (mn_major ? i : 0), k + (mn_major ? 0 : i), shape.fp8 ? e4m3(uint8_t(pair)) : bf16(pair));
                }
            }
        }
    };
    read(first.b_descriptor, shape.b_mn_major, 0, shape.n, [](int n, int k, float x) { b[k][n] = x; });
    if (!shape.a_in_registers) {
        read(first.a_descriptor, shape.a_mn_major, first_row, 16, [](int m, int k, float x) { a[m][k] = x; });
    }
    for (int i = 0; i < 32; ++i) {
        const Wgmma &own = threads[i].in_flight.front();
        for (int r = 0; r < int(own.a.size()); ++r) {
            const uint32_t word = *own.a[r];
            if (word != own.a_at_issue[r]) {
                fail("a register of A was written while a wgmma reads it");
            }
            const int row = i / 4 + 8 * (r % 2);
            for (int j = 0; j < 4 / bytes; ++j) {
                const int column = i % 4 * (4 / bytes) + r / 2 * (16 / bytes) + j;
                a[row][column] = shape.fp8 ? e4m3(uint8_t(word >> (8 * j))) : bf16(uint16_t(word >> (16 * j)));
            }
        }
    }
    if (shape.fp16_sums) {
        multiply(a, b, exact, shape.n, shape.k);
    } else {
        multiply(a, b, product, shape.n, shape.k);
    }
    for (int i = 0; i < 32; ++i) {
        Thread &thread = threads[i];
        const Wgmma own = std::move(thread.in_flight.front());
        thread.in_flight.pop_front();
        std::vector<float> &result = thread.results.at(own.d[0]);
        for (int e = 0; e < int(result.size()); ++e) {
            const int row = i / 4 + 8 * (e / 2 % 2), column = e / 4 * 8 + i % 4 * 2 + e % 2;
            const float before = own.accumulate ? result[e] : 0.0f;
            result[e] = shape.fp16_sums ? __half2float(__double2half(before + exact[row][column]))
                                        : before + product[row][column];
        }
        const bool last = std::none_of(thread.in_flight.begin(), thread.in_flight.end(),
                                       [&](const Wgmma &later) { return later.d[0] == own.d[0]; });
        if (last) {
            if (std::any_of(own.d.begin(), own.d.end(), [](void *reg) { return word(reg) != kPoison; })) {
                fail("an accumulator was written while a wgmma owns it");
            }
            for (int e = 0; e < int(result.size()); ++e) {
                set_element(own.d, shape, e, result[e]);
            }
            thread.results.erase(own.d[0]);
        }
    }
    ++cta.executed[warp];
    progress();
    return true;
}

}  // namespace

void fail(const char *format, ...) {
    char text[256];
    va_list arguments;
    va_start(arguments, format);
    std::vsnprintf(text, sizeof text, format, arguments);
    va_end(arguments);
    throw std::runtime_error(text);
}

void progress() {
    idle_steps = 0;
}

void yield() {
    emulator_switch(&current->stack_pointer, scheduler_stack_pointer);
}

char *shared_memory() {
    return current->cta->memory + 16;  // the runtime guarantees 16 bytes of alignment only
}

uint32_t shared_address(const void *p) {
    const auto offset = static_cast<const char *>(p) - current->cta->memory;
    if (offset < 0 || offset >= long(kSharedBytes)) {
        fail("an address outside of shared memory");
    }
    return uint32_t(offset);
}

void barrier(int threads) {
    CtaBarrier &barrier = current->cta->barrier;
    const uint64_t generation = barrier.generation;
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress();
    }
    while (barrier.generation == generation) {
        yield();
    }
    current->acquired_at = ++now;
}

uint32_t shuffle(uint32_t x, int from) {
    return meet(&x, 1, publish).shared[from];
}

bool all(bool x) {
    const uint32_t word = x;
    const Meeting &meeting = meet(&word, 1, publish);
    return std::all_of(meeting.shared, meeting.shared + 32, [](uint32_t y) { return y != 0; });
}

int largest(int x) {
    const uint32_t word = x;
    const Meeting &meeting = meet(&word, 1, publish);
    int top = x;
    for (const uint32_t y : meeting.shared) {
        top = std::max(top, int(y));
    }
    return top;
}

void note_load(const void *p) {
    Cta &cta = *current->cta;
    const auto offset = static_cast<const char *>(p) - cta.memory;
    if (offset >= 0 && offset < long(kSharedBytes)) {
        cta.chunks[offset / kChunk].loaded_at = ++now;
    }
}

void store_matrices(uint32_t row, const uint32_t (&words)[4]) {
    if (row % 16 != 0) {
        fail("stmatrix to a misaligned row");
    }
    const uint32_t row_and_words[5] = {row, words[0], words[1], words[2], words[3]};
    meet(row_and_words, 5, [](const Meeting &meeting) {
        Cta &cta = *current->cta;
        ++now;
        for (int matrix = 0; matrix < 4; ++matrix) {
            for (int lane = 0; lane < 32; ++lane) {
                const uint32_t row = meeting.words[8 * matrix + lane / 4][0];
                cta.chunks[row / kChunk].written_at = now;
                std::memcpy(cta.memory + row + 4 * (lane % 4), &meeting.words[lane][1 + matrix], 4);
            }
        }
    });
}

void mbarrier_init(void *barrier, int arrivals) {
    Mbarrier fresh;
    fresh.arrivals = fresh.pending = arrivals;
    current->cta->mbarriers[barrier] = fresh;
}

void mbarrier_expect(void *barrier, int bytes) {
    mbarrier_of(*current->cta, barrier).bytes += bytes;
}

void mbarrier_arrive(void *barrier) {
    Mbarrier &mbarrier = mbarrier_of(*current->cta, barrier);
    --mbarrier.pending;
    complete_phase(mbarrier);
    // A thread that has arrived may be delayed here, while others go on.
    for (int late = random_number() % 8 == 0 ? 64 : 0; late > 0; --late) {
        yield();
    }
}

bool mbarrier_completed(void *barrier, uint32_t parity) {
    const bool completed = mbarrier_of(*current->cta, barrier).phase != parity;
    if (completed) {
        current->acquired_at = ++now;
    }
    return completed;
}

void fence_mbarrier_init() {
    for (auto &[address, barrier] : current->cta->mbarriers) {
        barrier.fenced = true;
    }
}

void fence_proxy_shared() {
    current->fenced_at = ++now;
}

void fence_proxy_global() {
    current->acquired_global = false;
}

void acquired_global() {
    current->acquired_global = true;
}

void check_bulk(const void *shared, const void *global, int bytes) {
    if (uintptr_t(shared) % 16 != 0 || uintptr_t(global) % 16 != 0 || bytes % 16 != 0) {
        fail("a bulk copy that is not aligned to 16 bytes");
    }
    shared_address(shared);
    shared_address(static_cast<const char *>(shared) + bytes - 1);
}

void bulk_copy(void *shared, const void *global, int bytes, void *barrier) {
    check_bulk(shared, global, bytes);
    std::memset(shared, 0xff, bytes);
    Cta &cta = *current->cta;
    if (!mbarrier_of(cta, barrier).fenced) {
        fail("a bulk copy counts on an mbarrier whose initialisation was not fenced");
    }
    const auto first = cta.chunks.begin() + shared_address(shared) / kChunk;
    if (std::any_of(first, first + bytes / kChunk, [](const Chunk &chunk) {
            return (chunk.filled_at > current->fenced_at && !chunk.read_by_wgmma) ||
                   chunk.loaded_at > current->fenced_at;
        })) {
        fail("a bulk copy over what threads have read, without a proxy fence ahead of it");
    }
    cta.copies.push_back(
        {static_cast<char *>(shared), static_cast<const char *>(global), bytes, barrier, nullptr, due(cta)});
}

void bulk_reduce_add(float *global, const float *shared, int bytes) {
    check_bulk(shared, global, bytes);
    if (current->fenced_at <= current->acquired_at || current->acquired_global) {
        fail("a bulk reduction without a proxy fence ahead of it");
    }
    Cta &cta = *current->cta;
    cta.copies.push_back(
        {reinterpret_cast<char *>(global), reinterpret_cast<const char *>(shared), bytes, nullptr, current, due(cta)});
}

void bulk_wait(bool until_read) {
    const std::vector<Copy> &copies = current->cta->copies;
    while (std::any_of(copies.begin(), copies.end(), [&](const Copy &copy) {
        return copy.issuer == current && !(until_read && !copy.read.empty());
    })) {
        yield();
    }
}

void wgmma(Shape shape, std::vector<const uint32_t *> a, uint64_t a_descriptor, uint64_t b_descriptor,
           std::vector<void *> d, bool accumulate) {
    Cta &cta = *current->cta;
    const int warpgroup = current->index / 128;
    const Issue issue{a_descriptor, b_descriptor, accumulate, shape.n};
    std::vector<Issue> &issued = cta.issued[warpgroup];
    if (current->issued == issued.size()) {
        issued.push_back(issue);
    } else if (!(issued[current->issued] == issue)) {
        fail("the threads of a warpgroup issue different wgmmas");
    }
    Wgmma operation{shape, a, {}, a_descriptor, b_descriptor, d, accumulate, current->fenced_at};
    for (const uint32_t *word : a) {
        operation.a_at_issue.push_back(*word);
    }
    std::vector<float> &result = current->results[d[0]];
    if (result.empty()) {
        for (int e = 0; e < int(d.size()) * (shape.fp16_sums ? 2 : 1); ++e) {
            result.push_back(element(d, shape, e));
        }
        for (void *reg : d) {
            word(reg) = kPoison;
        }
    }
    current->in_flight.push_back(std::move(operation));
    ++current->issued;
    progress();
    for (int warp = 4 * warpgroup; eager_wgmma && warp < 4 * warpgroup + 4; ++warp) {
        while (execute(cta, warp)) {}
    }
}

void wgmma_commit() {
    current->groups.push_back(current->issued);
}

void wgmma_wait(int groups) {
    const long group = long(current->groups.size()) - groups - 1;
    if (group < 0) {
        return;
    }
    Cta &cta = *current->cta;
    const int warp = current->index / 32;
    while (cta.executed[warp] < current->groups[group]) {
        if (random_number() % 64 != 0 || !execute(cta, warp)) {
            yield();
        }
    }
}

void run(dim3 grid, int threads, size_t shared_bytes, std::function<void()> body) {
    if (threads % 32 != 0 || shared_bytes > kSharedBytes - 1024) {
        fail("a launch with %d threads and %zu bytes of shared memory", threads, shared_bytes);
    }
    blockDim = dim3(threads);
    gridDim = grid;
    kernel_body = std::move(body);
    idle_steps = 0;
    // Static shared memory is one for all CTAs.
    const size_t at_once = shared_bytes > 0 ? concurrent_ctas : 1;
    ctas.resize(std::max(ctas.size(), at_once));
    for (Cta &cta : ctas) {
        cta.live = 0;  // a failed launch leaves some
        cta.copies.clear();
    }
    // CTAs start in any order: CUDA promises none.
    std::vector<unsigned> order(grid.x * grid.y * grid.z);
    std::iota(order.begin(), order.end(), 0u);
    for (size_t i = order.size(); i > 1; --i) {
        std::swap(order[i - 1], order[random_number() % i]);
    }
    for (size_t next = 0;;) {
        std::vector<Cta *> live;
        for (size_t i = 0; i < at_once; ++i) {
            if (ctas[i].live == 0 && next < order.size()) {
                finish(ctas[i]);
                const unsigned index = order[next++];
                start(ctas[i], {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y}, threads);
            }
            if (ctas[i].live > 0) {
                live.push_back(&ctas[i]);
            }
        }
        if (live.empty()) {
            std::for_each(ctas.begin(), ctas.end(), finish);
            return;
        }
        Cta &cta = *live[random_number() % live.size()];
        // All threads from a random one on, or 32 of them, or a few: a few tear a warp apart where no barrier
        // protects it.
        const int counts[] = {threads, 32, 8};
        const int first = int(random_number() % threads), count = counts[random_number() % 3];
        for (int i = 0; i < count; ++i) {
            Thread &thread = cta.threads[(first + i) % threads];
            if (!thread.done) {
                resume(thread);
            }
        }
        while (!cta.copies.empty() && random_number() % 4 == 0) {
            const size_t which = random_number() % cta.copies.size();
            if (cta.copies[which].due <= cta.steps) {
                land(cta, which);
            }
        }
        ++cta.steps;
        if (++idle_steps > kStepsOfDeadlock) {
            fail("deadlock in CTA %u", cta.index.x);
        }
    }
}

}  // namespace emulator

// Called through ctypes: sets the schedule of later launches.
extern "C" __attribute__((visibility("default"))) void emulator_configure(int ctas, int eager, uint64_t seed,
                                                                          int mutation) {
    emulator::active_mutation = mutation;
    emulator::concurrent_ctas = ctas;
    emulator::eager_wgmma = eager != 0;
    emulator::random_state = seed * 0x9e3779b97f4a7c15u + 1;
}

// The part of the CUDA runtime that the host code calls.
cudaError_t cudaGetDevice(int *device) {
    *device = 0;
    return cudaSuccess;
}
cudaError_t cudaSetDevice(int) {
    return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *begin, int value, size_t bytes, cudaStream_t) {
    std::memset(begin, value, bytes);
    return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr, int) {
    *value = 3;  // SMs: few, so that a CTA of the persistent forward takes several work items
    return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
const char *cudaGetErrorName(cudaError_t) {
    return "";
}
const char *cudaGetErrorString(cudaError_t) {
    return "";
}
