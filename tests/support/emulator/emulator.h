// CUDA device code on one thread of a CPU: what a kernel's text needs to compile as C++ and to run.
//
// Every CUDA thread has a stack of its own. One scheduler resumes them in rounds, warp by warp. A
// thread runs until it comes to a barrier, a shuffle, a load with a memory order or a sleep. The
// seed of a launch draws where each round begins and which warps sit it out.
//
// __init__.py says what is modelled and what is not, and turns PTX into calls of what is here.
#pragma once

#include <setjmp.h>
#include <sys/mman.h>
#include <time.h>
#include <ucontext.h>

#include <cmath>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#define __constant__
#define __device__
#define __global__
#define __forceinline__ inline
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) alignas(bytes)

struct alignas(16) uint4 {
    unsigned x, y, z, w;
};
struct alignas(16) ulonglong2 {
    unsigned long long x, y;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

namespace emulator {

constexpr size_t kStackBytes = 128 << 10;
constexpr size_t kStaticBytes = 64 << 10;  // of a block's shared memory
constexpr int kMostVariables = 64;         // in static shared memory
constexpr int kBarriers = 16;
constexpr int kLanes = 32;
constexpr unsigned char kUnwritten = 0xcd;  // shared memory holds it before anything else

struct Index {
    unsigned x, y, z;
};

struct Warp {
    unsigned generation;  // exchanges that are over
    int arrived, alive;
    uint64_t values[2][kLanes];  // of two exchanges in turn
};

struct Barrier {
    unsigned generation;  // how often it has opened
    int arrived;
    bool any[2];  // votes, of two generations in turn
};

struct Block {
    Index index, size, grid;
    int alive;
    Barrier barriers[kBarriers];
    char* shared;  // dynamic, then static
    size_t dynamic_bytes, bytes, used;
    char* variables[kMostVariables];
};

struct Thread {
    Index index;
    Block* block;
    Warp* warp;
    char* stack;
    bool begun, done;
    const unsigned* awaited;  // it waits until this word differs from `seen`; or null
    unsigned seen;
    jmp_buf where;
};

static Thread* current;
static jmp_buf scheduler;
static void (*start)();
static char failure[256];

// -- threads --------------------------------------------------------------------------------------

inline void pause() {
    if (!_setjmp(current->where)) _longjmp(scheduler, 1);
}

// Ends the launch.
[[noreturn]] inline void fail(const char* format, ...) {
    va_list values;
    va_start(values, format);
    char what[160];
    vsnprintf(what, sizeof what, format, values);
    va_end(values);
    snprintf(failure, sizeof failure, "%s (rank %u, block %u, thread %u)", what,
             current->block->index.y, current->block->index.x, current->index.x);
    _longjmp(scheduler, 1);
}

inline void wait_for_change(const unsigned& word, unsigned seen) {
    current->awaited = &word;
    current->seen = seen;
    while (word == seen) pause();
    current->awaited = nullptr;
}

inline void open(Barrier& barrier) {
    barrier.arrived = 0;
    // All have arrived, so all have read the votes before, and nobody has cast the next one.
    barrier.any[++barrier.generation % 2] = false;
}

inline void arrive(int id, int threads, bool waits) {
    if (id < 0 || id >= kBarriers) fail("there is no barrier %d", id);
    Barrier& barrier = current->block->barriers[id];
    const unsigned generation = barrier.generation;
    if (++barrier.arrived >= threads)
        open(barrier);
    else if (waits)
        wait_for_change(barrier.generation, generation);
}

inline void run_thread() {
    start();
    Block& block = *current->block;
    current->done = true;
    --current->warp->alive;
    if (--block.alive > 0 && block.barriers[0].arrived == block.alive) open(block.barriers[0]);
    _longjmp(scheduler, 1);
}

__attribute__((noinline)) inline void resume(Thread& thread) {
    current = &thread;
    if (_setjmp(scheduler)) return;
    if (thread.begun) _longjmp(thread.where, 1);
    thread.begun = true;
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = thread.stack;
    context.uc_stack.ss_size = kStackBytes;
    context.uc_link = nullptr;
    makecontext(&context, run_thread, 0);
    setcontext(&context);
}

inline double seconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec + 1e-9 * now.tv_nsec;
}

struct Draw {
    uint64_t state;

    unsigned operator()(unsigned below) {  // splitmix64
        uint64_t z = (state += 0x9e3779b97f4a7c15ull);
        z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
        z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
        return static_cast<unsigned>((z ^ (z >> 31)) >> 32) % below;
    }
};

// Until all threads are done, one of them has failed, none can go on, or time is up.
inline void schedule(Thread* threads, int count, double limit_s, Draw draw) {
    const int warps = count / kLanes;
    const double end = seconds() + limit_s;
    for (int left = count; left > 0;) {
        const int first = draw(warps);
        bool able = false;
        for (int i = 0; i < warps; ++i) {
            Thread* const lanes = threads + (first + i) % warps * kLanes;
            const bool sits_out = draw(8) == 0;
            for (Thread* thread = lanes; thread < lanes + kLanes; ++thread) {
                if (thread->done || (thread->awaited && *thread->awaited == thread->seen)) continue;
                able = true;
                if (sits_out) break;
                resume(*thread);
                if (failure[0]) return;
                left -= thread->done;
            }
        }
        if (!able && left) {
            for (current = threads; current->done;) ++current;
            if (_setjmp(scheduler) == 0) fail("%d threads wait at barriers for ever", left);
            return;
        }
        if (seconds() > end) {
            snprintf(failure, sizeof failure, "%d threads still run after %g s", left, limit_s);
            return;
        }
    }
}

// Null, or why the launch ended before its threads. `grid.y` is the number of ranks.
inline const char* launch(void (*thread)(), Index grid, int size, size_t shared_bytes,
                          double limit_s, uint64_t seed) {
    const int num_blocks = grid.x * grid.y, count = num_blocks * size;
    Thread* const threads = static_cast<Thread*>(calloc(count, sizeof(Thread)));
    Warp* const warps = static_cast<Warp*>(calloc(count / kLanes, sizeof(Warp)));
    Block* const blocks = static_cast<Block*>(calloc(num_blocks, sizeof(Block)));
    const size_t dynamic_bytes = (shared_bytes + 127) / 128 * 128;
    const size_t bytes = dynamic_bytes + kStaticBytes;
    const size_t stacks_bytes = kStackBytes * count;
    char* const shared = static_cast<char*>(aligned_alloc(128, bytes * num_blocks));
    void* const stacks = mmap(nullptr, stacks_bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    failure[0] = 0;
    if (size % kLanes || stacks == MAP_FAILED || !threads || !warps || !blocks || !shared) {
        snprintf(failure, sizeof failure, "no room for %d threads", count);
    } else {
        memset(shared, kUnwritten, bytes * num_blocks);
        for (int b = 0; b < num_blocks; ++b) {
            Block& block = blocks[b];
            block.index = {b % grid.x, b / grid.x, 0};
            block.size = {static_cast<unsigned>(size), 1, 1};
            block.grid = grid;
            block.alive = size;
            block.shared = shared + b * bytes;
            block.dynamic_bytes = block.used = dynamic_bytes;
            block.bytes = bytes;
        }
        for (int t = 0; t < count; ++t) {
            threads[t].index = {static_cast<unsigned>(t % size), 0, 0};
            threads[t].block = &blocks[t / size];
            threads[t].warp = &warps[t / kLanes];
            threads[t].stack = static_cast<char*>(stacks) + kStackBytes * t;
            ++threads[t].warp->alive;
        }
        start = thread;
        schedule(threads, count, limit_s, Draw{seed});
    }
    if (stacks != MAP_FAILED) munmap(stacks, stacks_bytes);
    free(shared);
    free(blocks);
    free(warps);
    free(threads);
    return failure[0] ? failure : nullptr;
}

// -- values of all lanes --------------------------------------------------------------------------

template <typename T>
inline uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

template <typename T>
inline T value_of(uint64_t bits) {
    T value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

inline unsigned lane() { return current->index.x % kLanes; }

inline const uint64_t* exchange(unsigned mask, uint64_t value) {
    Warp& warp = *current->warp;
    if (mask != 0xffffffffu || warp.alive != kLanes) fail("not all lanes take part: %08x", mask);
    const unsigned generation = warp.generation;
    uint64_t* const values = warp.values[generation % 2];
    values[lane()] = value;
    if (++warp.arrived == kLanes) {
        warp.arrived = 0;
        ++warp.generation;
    } else {
        wait_for_change(warp.generation, generation);
    }
    return values;
}

template <typename T, typename Fold>
inline T reduce(unsigned mask, T value, const Fold& fold) {
    const uint64_t* const values = exchange(mask, bits_of(value));
    T result = value_of<T>(values[0]);
    for (int i = 1; i < kLanes; ++i) result = fold(result, value_of<T>(values[i]));
    return result;
}

// -- shared memory --------------------------------------------------------------------------------

template <typename T>
inline T* dynamic_shared() {
    return reinterpret_cast<T*>(current->block->shared);
}

// Variable `id` of the block's static shared memory.
template <typename T>
inline T& shared(int id) {
    Block& block = *current->block;
    if (id >= kMostVariables) fail("more than %d shared variables", kMostVariables);
    if (block.variables[id] == nullptr) {
        block.variables[id] = block.shared + block.used;
        block.used += (sizeof(T) + 127) / 128 * 128;
        if (block.used > block.bytes) fail("no room in static shared memory");
    }
    return *reinterpret_cast<T*>(block.variables[id]);
}

inline char* at_shared(unsigned address) { return current->block->shared + address; }

// The address of `bytes` of shared memory that a 16-byte copy touches.
inline char* checked_shared(unsigned address, unsigned bytes) {
    if (address % 16 || bytes % 16 || address + bytes > current->block->bytes)
        fail("a copy of %u bytes at shared address %u", bytes, address);
    return at_shared(address);
}

inline char* checked_global(const void* address, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("a copy of %u bytes at %p", bytes, address);
    return static_cast<char*>(const_cast<void*>(address));
}

inline void copy_to_shared(unsigned shared, const void* global, unsigned bytes) {
    memcpy(checked_shared(shared, bytes), checked_global(global, bytes), bytes);
}

inline void copy_from_shared(void* global, unsigned shared, unsigned bytes) {
    memcpy(checked_global(global, bytes), checked_shared(shared, bytes), bytes);
}

inline void load_shared_words(unsigned shared, unsigned& x, unsigned& y, unsigned& z, unsigned& w) {
    uint4 words;
    copy_from_shared(&words, shared, sizeof words);
    x = words.x, y = words.y, z = words.z, w = words.w;
}

// An mbarrier of one arriving thread.
struct Mbarrier {
    int bytes;  // expected, less those that came
    unsigned short phases, armed;
};

inline Mbarrier& mbarrier(unsigned address) {
    return *reinterpret_cast<Mbarrier*>(at_shared(address));
}

inline void close_phase(Mbarrier& barrier) {
    if (!barrier.armed || barrier.bytes != 0) return;
    barrier.armed = 0;
    ++barrier.phases;
}

inline void mbarrier_init(unsigned address) { mbarrier(address) = {0, 0, 0}; }

inline void mbarrier_expect(unsigned address, unsigned bytes) {
    Mbarrier& barrier = mbarrier(address);
    if (barrier.armed) fail("a second arrival at the mbarrier %u", address);
    barrier.armed = 1;
    barrier.bytes += bytes;
    close_phase(barrier);
}

inline void bulk_load(unsigned shared, const void* global, unsigned bytes, unsigned address) {
    copy_to_shared(shared, global, bytes);
    mbarrier(address).bytes -= bytes;
    close_phase(mbarrier(address));
}

inline unsigned mbarrier_test(unsigned address, unsigned parity) {
    if (mbarrier(address).phases % 2 != parity % 2) return 1;
    pause();
    return 0;
}

// -- global memory --------------------------------------------------------------------------------

// Others run before every load that may be one of a poll.
template <typename T>
inline T load(const T* word) {
    pause();
    return __atomic_load_n(word, __ATOMIC_ACQUIRE);
}

template <typename T, typename U>
inline void store(T* word, U value) {
    __atomic_store_n(word, static_cast<T>(value), __ATOMIC_RELEASE);
}

template <typename T>
inline T add(T* word, T value) {
    return __atomic_fetch_add(word, value, __ATOMIC_ACQ_REL);
}

inline void load_words(const void* from, unsigned& x, unsigned& y, unsigned& z, unsigned& w) {
    pause();
    uint4 words;
    memcpy(&words, checked_global(from, 16), 16);
    x = words.x, y = words.y, z = words.z, w = words.w;
}

inline void load_pair(const unsigned long long* from, unsigned long long& x,
                      unsigned long long& y) {
    pause();
    x = from[0], y = from[1];
}

inline unsigned long long nanoseconds() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ull + now.tv_nsec;
}

// -- number formats -------------------------------------------------------------------------------

inline float widen_half(unsigned short bits) {
    _Float16 half;
    memcpy(&half, &bits, 2);
    return half;
}

inline unsigned short narrow_half(float wide) {
    const _Float16 half = static_cast<_Float16>(wide);
    return static_cast<unsigned short>(bits_of(half));
}

inline unsigned short narrow_bfloat16(float wide) {
    const unsigned bits = static_cast<unsigned>(bits_of(wide));
    return wide == wide ? (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16 : 0x7fff;
}

// e4m3, to nearest even, largest magnitude 448.
inline unsigned narrow_e4m3(float wide) {
    const unsigned sign = static_cast<unsigned>(bits_of(wide)) >> 31 << 7;
    const float magnitude = fabsf(wide);
    if (wide != wide) return sign | 0x7f;
    if (magnitude >= 448.0f) return sign | 0x7e;
    if (magnitude < 0.015625f)  // subnormal
        return sign | static_cast<unsigned>(nearbyintf(magnitude * 512.0f));
    int exponent;
    const float fraction = frexpf(magnitude, &exponent);  // 0.5 or more, below 1
    // A fraction that rounds up to 16 carries into the exponent.
    return sign | ((exponent + 5) * 8 + static_cast<unsigned>(nearbyintf(fraction * 16.0f)));
}

inline unsigned larger_halves(unsigned a, unsigned b) {
    const unsigned low = (a & 0xffffu) > (b & 0xffffu) ? a : b;
    const unsigned high = a >> 16 > b >> 16 ? a : b;
    return (high & 0xffff0000u) | (low & 0xffffu);
}

}  // namespace emulator

// -- CUDA's own names -----------------------------------------------------------------------------

#define threadIdx (emulator::current->index)
#define blockIdx (emulator::current->block->index)
#define blockDim (emulator::current->block->size)
#define gridDim (emulator::current->block->grid)

inline void __syncthreads() { emulator::arrive(0, emulator::current->block->alive, true); }

inline int __syncthreads_or(int vote) {
    emulator::Barrier& barrier = emulator::current->block->barriers[0];
    bool& any = barrier.any[barrier.generation % 2];
    any |= vote != 0;
    __syncthreads();
    return any;
}

inline int __syncthreads_and(int vote) { return !__syncthreads_or(!vote); }

inline void __syncwarp() { emulator::exchange(0xffffffffu, 0); }

template <typename T>
inline T __shfl_sync(unsigned mask, T value, int from) {
    return emulator::value_of<T>(emulator::exchange(mask, emulator::bits_of(value))[from & 31]);
}

template <typename T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned distance) {
    const unsigned lane = emulator::lane();
    return __shfl_sync(mask, value, lane >= distance ? lane - distance : lane);
}

template <typename T>
inline T __shfl_xor_sync(unsigned mask, T value, int other) {
    return __shfl_sync(mask, value, emulator::lane() ^ other);
}

inline unsigned __ballot_sync(unsigned mask, int vote) {
    const unsigned own = vote ? 1u << emulator::lane() : 0u;
    return emulator::reduce(mask, own, [](unsigned a, unsigned b) { return a | b; });
}

inline int __any_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) != 0; }
inline int __all_sync(unsigned mask, int vote) { return __ballot_sync(mask, vote) == mask; }

inline unsigned __reduce_or_sync(unsigned mask, unsigned value) {
    return emulator::reduce(mask, value, [](unsigned a, unsigned b) { return a | b; });
}

template <typename T>
inline T __reduce_max_sync(unsigned mask, T value) {
    return emulator::reduce(mask, value, [](T a, T b) { return a > b ? a : b; });
}

template <typename T>
inline T __reduce_min_sync(unsigned mask, T value) {
    return emulator::reduce(mask, value, [](T a, T b) { return a < b ? a : b; });
}

template <typename T>
inline unsigned __match_any_sync(unsigned mask, T value) {
    const uint64_t own = emulator::bits_of(value);
    const uint64_t* const values = emulator::exchange(mask, own);
    unsigned equal = 0;
    for (int i = 0; i < emulator::kLanes; ++i) equal |= (values[i] == own ? 1u : 0u) << i;
    return equal;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline void __nanosleep(unsigned) { emulator::pause(); }
inline void __threadfence() {}

inline size_t __cvta_generic_to_shared(const void* pointer) {
    const emulator::Block& block = *emulator::current->block;
    const char* const address = static_cast<const char*>(pointer);
    if (address < block.shared || address >= block.shared + block.bytes)
        emulator::fail("%p is not in the block's shared memory", pointer);
    return address - block.shared;
}

inline void* __cvta_shared_to_generic(size_t address) { return emulator::at_shared(address); }

template <typename T>
inline T* __cvta_generic_to_global(T* pointer) {
    return pointer;
}

inline float __uint_as_float(unsigned bits) { return emulator::value_of<float>(bits); }
inline float __int_as_float(int bits) { return __uint_as_float(static_cast<unsigned>(bits)); }
inline unsigned __float_as_uint(float x) { return static_cast<unsigned>(emulator::bits_of(x)); }
inline int __float_as_int(float x) { return static_cast<int>(__float_as_uint(x)); }

// The compiler is told not to fuse them (-ffp-contract=off).
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline double __dadd_rn(double a, double b) { return a + b; }

template <typename T, typename U>
inline T atomicAdd(T* word, U value) {
    return emulator::add(word, static_cast<T>(value));
}

template <typename T, typename U>
inline T atomicSub(T* word, U value) {
    return emulator::add(word, static_cast<T>(0 - static_cast<T>(value)));
}

template <typename T, typename U>
inline T atomicOr(T* word, U value) {
    return __atomic_fetch_or(word, static_cast<T>(value), __ATOMIC_ACQ_REL);
}

template <typename T, typename U>
inline T atomicAnd(T* word, U value) {
    return __atomic_fetch_and(word, static_cast<T>(value), __ATOMIC_ACQ_REL);
}

template <typename T, typename U>
inline T atomicExch(T* word, U value) {
    return __atomic_exchange_n(word, static_cast<T>(value), __ATOMIC_ACQ_REL);
}

template <typename T, typename U>
inline T atomicMax(T* word, U value) {
    const T before = *word;
    if (before < static_cast<T>(value)) *word = static_cast<T>(value);
    return before;
}

inline unsigned atomicCAS(unsigned* word, unsigned expected, unsigned value) {
    const unsigned before = *word;
    if (before == expected) *word = value;
    return before;
}

#define EMULATOR_MIN_MAX(T, A, B)                                                    \
    inline T min(A a, B b) { return static_cast<T>(a) < static_cast<T>(b) ? a : b; } \
    inline T max(A a, B b) { return static_cast<T>(a) > static_cast<T>(b) ? a : b; }
EMULATOR_MIN_MAX(int, int, int)
EMULATOR_MIN_MAX(unsigned, unsigned, unsigned)
EMULATOR_MIN_MAX(unsigned, int, unsigned)
EMULATOR_MIN_MAX(unsigned, unsigned, int)
EMULATOR_MIN_MAX(long long, long long, long long)
EMULATOR_MIN_MAX(unsigned long long, unsigned long long, unsigned long long)
EMULATOR_MIN_MAX(float, float, float)
#undef EMULATOR_MIN_MAX
