// The kernels of sampled_groups.py, which says what they compute and gives THREADS, SETS and OCTETS.
// HALF: of float16 instead of bfloat16.

#define WARPS (THREADS / 32)
#define VECTORS 8

__device__ __forceinline__ unsigned address(const void* at) { return (unsigned)__cvta_generic_to_shared(at); }

// Four matrices of 8 × 8 numbers: each thread names a row of 16 bytes.
__device__ __forceinline__ void read(unsigned (&x)[4], unsigned from) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void transpose(unsigned to, unsigned from) {
    unsigned a, b, c, d;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(from) : "memory");
    asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};"
                 :: "r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}

// All 16 × 8 products of the features in a and b, over 8 vectors.
__device__ __forceinline__ void multiply(float (&d)[4], unsigned a0, unsigned a1, unsigned b) {
#ifdef HALF
#define TYPES "f32.f16.f16.f32"
#else
#define TYPES "f32.bf16.bf16.f32"
#endif
    asm("mma.sync.aligned.m16n8k8.row.col." TYPES " {%0, %1, %2, %3}, {%4, %5}, {%6}, {%7, %7, %7, %7};"
        : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3]) : "r"(a0), "r"(a1), "r"(b), "f"(0.0f));
}

__device__ __forceinline__ void copy(unsigned to, const void* from, unsigned bytes, unsigned barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 :: "r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void wait(unsigned barrier, unsigned phase) {
    asm volatile("{\n.reg .pred done;\nagain:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
                 "@!done bra again;\n}" :: "r"(barrier), "r"(phase) : "memory");
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) sampled_sums(
    const unsigned short* held, const unsigned short* streamed, int held_stride, int streamed_stride,
    const int* groups, const uint2* slots, float* parts, int vectors, int share, int places, int group_count)
{
    // Features with their vectors in one piece; the vectors as they come, each a row of ``pitch`` octets; a barrier.
    extern __shared__ __align__(128) uint4 memory[];
    uint4* rows = memory + OCTETS * 8;
    const unsigned barrier = address(rows + (OCTETS + 1) * VECTORS);
    const int thread = threadIdx.x, lane = thread & 31, warp = thread >> 5;
    const int* group = groups + (blockIdx.x % group_count) * 6;
    const int part = blockIdx.x / group_count;
    const int first = group[0], sets = group[1];
    const int held_octets = group[3], octets = held_octets + group[5];
    const int pitch = octets | 1;  // odd, so that a column of rows lies in different banks
    const int start = part * share, stop = min(start + share, vectors);
    held += group[2] * 8;
    streamed += group[4] * 8;

    auto load = [&](int t) {  // by one warp
        const int count = min(VECTORS, stop - t);
        if (lane == 0)
            asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                         :: "r"(barrier), "r"(count * octets * 16) : "memory");
        __syncwarp();
        const int row = lane & 7;
        if (row < count && lane < 8)
            copy(address(rows + row * pitch), held + (long long)(t + row) * held_stride, held_octets * 16, barrier);
        else if (row < count && lane < 16)
            copy(address(rows + row * pitch + held_octets), streamed + (long long)(t + row) * streamed_stride,
                 (octets - held_octets) * 16, barrier);
    };
    if (thread == 0) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" :: "r"(barrier) : "memory");
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    __syncthreads();
    if (warp == 0) load(start);

    uint2 slot[SETS];
    float sum[SETS][2];
#pragma unroll
    for (int i = 0; i < SETS; i++) {
        const int set = i * WARPS + warp;
        slot[i] = set < sets ? slots[(first + set) * 32 + lane] : make_uint2(0, 0);
        sum[i][0] = sum[i][1] = 0;
    }
    // Of the 16 × 8 products of a unit, this thread has those of row lane / 4 that are wanted in unit ``mine`` of four.
    const int mine = ((lane & 3) - (lane >> 3)) & 3;
    const bool odd = lane >> 2 & 1, second = mine & 1, later = mine & 2;
    const unsigned base = address(memory);
    unsigned phase = 0;
    for (int t = start; t < stop; t += VECTORS, phase ^= 1) {
        wait(barrier, phase);
        if (stop - t < VECTORS) {
            for (int i = thread; i < (VECTORS - (stop - t)) * pitch; i += THREADS)
                rows[(stop - t) * pitch + i] = make_uint4(0, 0, 0, 0);
            __syncthreads();
        }
        for (int i = warp * 4; i < octets; i += WARPS * 4)
            transpose(base + (i * 8 + lane) * 16, address(rows + (lane & 7) * pitch + i + (lane >> 3)));
        __syncthreads();
        if (warp == 0 && t + VECTORS < stop) load(t + VECTORS);
#pragma unroll
        for (int i = 0; i < SETS; i++) {
            if (i * WARPS + warp < sets) {
                asm volatile("" : "+r"(slot[i].x), "+r"(slot[i].y));  // or addresses would be kept, for want of registers
                unsigned x[4][4];
                read(x[0], base + (slot[i].x & 0xffffu) * 16);
                read(x[1], base + (slot[i].x >> 16) * 16);
                read(x[2], base + (slot[i].y & 0xffffu) * 16);
                read(x[3], base + (slot[i].y >> 16) * 16);
                float low[4][4], high[4][4];
#pragma unroll
                for (int unit = 0; unit < 4; unit++) {
                    multiply(low[unit], x[unit][0], x[unit][1], x[unit][2]);
                    multiply(high[unit], x[unit][0], x[unit][1], x[unit][3]);
                    low[unit][0] = odd ? low[unit][1] : low[unit][0];
                    high[unit][2] = odd ? high[unit][3] : high[unit][2];
                }
                const float low01 = second ? low[1][0] : low[0][0], low23 = second ? low[3][0] : low[2][0];
                const float high01 = second ? high[1][2] : high[0][2], high23 = second ? high[3][2] : high[2][2];
                sum[i][0] += later ? low23 : low01;
                sum[i][1] += later ? high23 : high01;
            }
        }
        __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < SETS; i++) {
        const int set = i * WARPS + warp;
        if (set < sets) {
            float* to = parts + (long long)part * places + (first + set) * 64 + mine * 16 + (lane >> 2);
            to[0] = sum[i][0];
            to[8] = sum[i][1];
        }
    }
}

// sums[order] = the parts added up; an order of -1 is none.
extern "C" __global__ void add_parts(const float* parts, const int* order, float* sums, int places, int count)
{
    const int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= places || order[i] < 0) return;
    float total = 0;
    for (int part = 0; part < count; part++) total += parts[(long long)part * places + i];
    sums[order[i]] = total;
}
