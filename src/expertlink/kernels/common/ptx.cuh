// PTX instructions that C++ has no words for: bulk copies, memory order, time.
//
// A bulk copy runs beside the thread that issues it. Loads into shared memory report to an
// mbarrier. Stores out of it belong to a group of the issuing thread. That thread waits either
// until the shared memory of the group has been read, and may be overwritten, or until its bytes
// are written, and may be announced to others.
#pragma once

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
    return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// Keeps an address in a register. The compiler would compute it again at every use.
template <typename T>
__device__ __forceinline__ T& at_hand(T& shared) {
    unsigned address = shared_address(&shared);
    asm volatile("" : "+r"(address));
    return *static_cast<T*>(__cvta_shared_to_generic(address));
}

// -- bulk copies ----------------------------------------------------------------------------------

__device__ __forceinline__ void barrier_init(unsigned long long* barrier) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier))
                 : "memory");
    // Fence: the copy engine must see the initialised barrier.
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void barrier_inval(unsigned long long* barrier) {
    asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// The barrier's current phase waits for `bytes` more.
__device__ __forceinline__ void barrier_expect(unsigned long long* barrier, unsigned bytes) {
    asm volatile(
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
        "r"(bytes)
        : "memory");
}

// Copies `bytes` (a multiple of 16) that the barrier expects.
__device__ __forceinline__ void bulk_copy(void* shared, const void* global, unsigned bytes,
                                          unsigned long long* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(shared)),
        "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

__device__ __forceinline__ void bulk_load(void* shared, const void* global, unsigned bytes,
                                          unsigned long long* barrier) {
    barrier_expect(barrier, bytes);
    bulk_copy(shared, global, bytes, barrier);
}

// Local copies always end, so this wait needs no bound.
__device__ __forceinline__ void bulk_load_wait(unsigned long long* barrier, unsigned parity) {
    unsigned done = 0;
    while (!done)
        asm volatile(
            "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;"
            "  selp.u32 %0, 1, 0, p; }"
            : "=r"(done)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
}

__device__ __forceinline__ void bulk_store(void* global, const void* shared, unsigned bytes) {
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(
                     __cvta_generic_to_global(global)),
                 "r"(shared_address(shared)), "r"(bytes)
                 : "memory");
}

__device__ __forceinline__ void bulk_commit() {
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

// Waits until the shared memory of all stores of this thread has been read.
__device__ __forceinline__ void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// Waits until the bytes of all stores of this thread are written.
__device__ __forceinline__ void bulk_wait_written() {
    asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

// Fence: bulk copies may read what this thread wrote to shared memory by ordinary stores.
__device__ __forceinline__ void fence_shared_to_bulk() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Fence: bulk copies may read what this thread has acquired in global memory.
__device__ __forceinline__ void fence_global_to_bulk() {
    asm volatile("fence.proxy.async.global;" ::: "memory");
}

// -- memory order ---------------------------------------------------------------------------------

__device__ __forceinline__ unsigned load_acquire_system(const unsigned* word) {
    unsigned value;
    asm volatile("ld.acquire.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void store_release_system(unsigned* word, unsigned value) {
    asm volatile("st.release.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ unsigned load_acquire_device(const unsigned* word) {
    unsigned value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ void store_release_device(unsigned* word, unsigned value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ void store_relaxed_system(unsigned* word, unsigned value) {
    asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(word), "r"(value) : "memory");
}

__device__ __forceinline__ void fence_system() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

__device__ __forceinline__ unsigned load_relaxed_system(const unsigned* word) {
    unsigned value;
    asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ unsigned load_acquire_block(const unsigned* word) {
    unsigned value;
    asm volatile("ld.acquire.cta.shared::cta.u32 %0, [%1];"
                 : "=r"(value)
                 : "r"(shared_address(word))
                 : "memory");
    return value;
}

__device__ __forceinline__ void store_release_block(unsigned* word, unsigned value) {
    asm volatile("st.release.cta.shared::cta.u32 [%0], %1;" ::"r"(shared_address(word)), "r"(value)
                 : "memory");
}

__device__ __forceinline__ void add_release_block(unsigned* word) {
    asm volatile("red.release.cta.shared::cta.add.u32 [%0], 1;" ::"r"(shared_address(word))
                 : "memory");
}

// Adds one. Acquire and release: the last of several arrivals sees what all others did.
__device__ __forceinline__ unsigned arrive_device(unsigned* word) {
    unsigned before;
    asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], 1;"
                 : "=r"(before)
                 : "l"(word)
                 : "memory");
    return before;
}

// -- loads past the L1 cache ----------------------------------------------------------------------
// Memory that peers write is read through the L2 cache. The L1 cache may hold an older copy.

__device__ __forceinline__ int load_fresh(const int* word) {
    int value;
    asm volatile("ld.relaxed.sys.global.s32 %0, [%1];" : "=r"(value) : "l"(word) : "memory");
    return value;
}

__device__ __forceinline__ uint4 load_fresh(const uint4* words) {
    uint4 value;
    asm volatile("ld.global.cg.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(value.x), "=r"(value.y), "=r"(value.z), "=r"(value.w)
                 : "l"(words)
                 : "memory");
    return value;
}

// -- time and launches ----------------------------------------------------------------------------

__device__ __forceinline__ unsigned long long nanoseconds() {
    unsigned long long now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    return now;
}

// Lets the kernel that follows this one start.
__device__ __forceinline__ void let_follower_start() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}

// Waits until the kernel before this one is over and its writes are visible.
__device__ __forceinline__ void wait_for_predecessor() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
