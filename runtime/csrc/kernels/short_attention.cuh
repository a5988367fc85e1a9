// Prefix/target attention over examples of few tokens (the rule of runtime/src/attention.rs), after FlashAttention-2
// (Dao 2023), with all that a head has of an example in shared memory: nothing is read twice, and no sum goes through
// atomics, for which the backward pass computes scores twice.
//
// Queries and keys are turned by rotary positions once they are there, their gradients turned back as they are written.
// A block works on one head of one example, a warp on 16 rows at a time.

#include "common.cuh"
#include "rotary.cuh"
#include "short_attention.h"

namespace {

constexpr int WORDS = HEAD_WIDTH / VECTOR;
constexpr int HALF_WORDS = WORDS / 2;
// Lanes that share a row of a product of the tensor cores, 16 x 8 x 16.
constexpr int QUAD = 4;
constexpr int STEPS = HEAD_WIDTH / 16;
constexpr int COLUMNS = HEAD_WIDTH / 8;
constexpr float SCALE = 0.125f;
constexpr float LOG2_E = 1.4426950408889634f;

// Left operand of a product: 16 x 16.
struct Left {
  unsigned at[4];
};

// 16 x 64 as left operands.
struct LeftRow {
  Left at[STEPS];
};

// Sums of products: 16 x 8.
struct Sums {
  float at[4];
};

// 16 x 64.
struct SumsRow {
  Sums at[COLUMNS];
};

__device__ void multiply(Sums& sums, const Left& a, unsigned low, unsigned high) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(sums.at[0]), "+f"(sums.at[1]), "+f"(sums.at[2]), "+f"(sums.at[3])
      : "r"(a.at[0]), "r"(a.at[1]), "r"(a.at[2]), "r"(a.at[3]), "r"(low), "r"(high));
}

// Two neighbouring 16 x 8 sums as a left operand.
__device__ Left as_left(const Sums& first, const Sums& second) {
  return {
      pair(first.at[0], first.at[1]), pair(first.at[2], first.at[3]), pair(second.at[0], second.at[1]),
      pair(second.at[2], second.at[3])};
}

// 2 to the power of what is no large number.
__device__ float power_of_two(float exponent) {
  float made;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(exponent));
  return made;
}

// A matrix of rows of 64 values at an address of shared memory, a multiple of a row's bytes. The words of a row are laid
// so that eight rows meet no bank twice: at places whose bits are turned round by those of the row. So the address of a
// word is that of the first one of its row with some bits turned round.
struct Matrix {
  static constexpr unsigned ROW_BYTES = HEAD_WIDTH * sizeof(bf16);
  static constexpr unsigned WORD_BYTES = VECTOR * sizeof(bf16);

  unsigned address;

  __device__ explicit Matrix(unsigned address) : address(address) {}
  __device__ explicit Matrix(const void* at) : Matrix(static_cast<unsigned>(__cvta_generic_to_shared(at))) {}

  // Of a word that may vary with the lane; another `i` words on in a row lies at `word(..) ^ i * WORD_BYTES`, for `i` that
  // have no bit in common with `word`.
  __device__ unsigned word(int row, int word) const { return address + row * ROW_BYTES + (word ^ row % WORDS) * WORD_BYTES; }

  // 16 rows as left operands.
  __device__ LeftRow left(int row) const {
    const int lane = threadIdx.x % WARP;
    const unsigned first = word(row + lane % 16, lane / 16);
    LeftRow made;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      unsigned(&at)[4] = made.at[step].at;
      asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                   : "=r"(at[0]), "=r"(at[1]), "=r"(at[2]), "=r"(at[3])
                   : "r"(first ^ step * 2 * WORD_BYTES));
    }
    return made;
  }

  // The lane's address for `rows` of 16 rows.
  __device__ unsigned rows_at(int row) const {
    const int lane = threadIdx.x % WARP;
    return word(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
  }

  // 16 rows, values `16 step ..` of each, as columns of right operands: two operands.
  __device__ static uint4 rows(unsigned at, int step) {
    uint4 made;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(made.x), "=r"(made.y), "=r"(made.z), "=r"(made.w)
                 : "r"(at ^ step * 2 * WORD_BYTES));
    return made;
  }

  // The lane's address for `columns` of 16 rows.
  __device__ unsigned columns_at(int row) const {
    const int lane = threadIdx.x % WARP;
    return word(row + lane % 16, lane / 16);
  }

  // The same as rows of right operands.
  __device__ static uint4 columns(unsigned at, int step) {
    uint4 made;
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(made.x), "=r"(made.y), "=r"(made.z), "=r"(made.w)
                 : "r"(at ^ step * 2 * WORD_BYTES));
    return made;
  }

  // Takes 16 rows, times the factors of the lane's two.
  __device__ void put(int row, const SumsRow& sums, float first, float second) const {
    const int lane = threadIdx.x % WARP;
    const unsigned at = word(row + lane / QUAD, 0) + lane % QUAD * 2 * sizeof(bf16);
#pragma unroll
    for (int column = 0; column < COLUMNS; ++column) {
      const Sums& s = sums.at[column];
      const unsigned to = at ^ column * WORD_BYTES;
      put_pair(to, pair(s.at[0] * first, s.at[1] * first));
      put_pair(to + 8 * ROW_BYTES, pair(s.at[2] * second, s.at[3] * second));
    }
  }

  __device__ static uint4 get_word(unsigned at) {
    uint4 made;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(made.x), "=r"(made.y), "=r"(made.z), "=r"(made.w)
                 : "r"(at));
    return made;
  }

  __device__ static void put_word(unsigned at, const uint4& word) {
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(word.x), "r"(word.y), "r"(word.z), "r"(word.w)
                 : "memory");
  }

 private:
  __device__ static void put_pair(unsigned at, unsigned both) {
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(both) : "memory");
  }
};

// One head of one example.
struct Example {
  int64_t start;
  int tokens, prefix, head;
  const float *cosines, *sines;

  __device__ Example(const ShortAttention& given, int block) {
    const int example = block / given.h;
    head = block % given.h;
    start = given.starts[example];
    tokens = given.starts[example + 1] - given.starts[example];
    prefix = given.prefixes[example];
    cosines = given.cosines == nullptr ? nullptr : given.cosines + start * HEAD_WIDTH;
    sines = given.sines == nullptr ? nullptr : given.sines + start * HEAD_WIDTH;
  }

  __device__ bf16* row(const Heads& heads, int token) const {
    return static_cast<bf16*>(heads.values) + (start + token) * heads.stride + head * HEAD_WIDTH;
  }

  __device__ int rows() const { return (tokens + ROWS_STEP - 1) / ROWS_STEP * ROWS_STEP; }

  // The last token that a token sees.
  __device__ int last_seen(int token) const { return min(max(token, prefix - 1), tokens - 1); }

  // Begins to fill a matrix; rows past the example become zero.
  __device__ void fetch(const Matrix& matrix, const Heads& heads) const {
    const int word = threadIdx.x % WORDS, step = blockDim.x / WORDS;
    for (int token = threadIdx.x / WORDS; token < rows(); token += step) {
      const bf16* const from = row(heads, min(token, tokens - 1)) + word * VECTOR;
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(matrix.word(token, word)), "l"(from),
                   "r"(token < tokens ? 16 : 0)
                   : "memory");
    }
  }

  // Ends all fetches of the block.
  __device__ static void wait() {
    asm volatile("cp.async.wait_all;" ::: "memory");
    __syncthreads();
  }

  // What words of a first half and their partners are turned by; read ahead, since it is long on its way.
  struct Angles {
    float4 cosines[2], sines[2];
  };

  __device__ Angles angles(int token, int word) const {
    const int at = token * HEAD_WIDTH + word * VECTOR;
    const auto *const c = reinterpret_cast<const float4*>(cosines + at), *const s = reinterpret_cast<const float4*>(sines + at);
    return {{c[0], c[1]}, {s[0], s[1]}};
  }

  __device__ bool is_turned(int token) const { return cosines != nullptr && token < tokens; }

  // What a thread needs to turn its share of queries and keys.
  template <int HELD>
  __device__ void angles_of_thread(Angles (&held)[HELD]) const {
    const int word = threadIdx.x % HALF_WORDS, step = blockDim.x / HALF_WORDS;
#pragma unroll
    for (int i = 0; i < HELD; ++i) {
      const int token = threadIdx.x / HALF_WORDS + i * step;
      if (is_turned(token)) held[i] = angles(token, word);
    }
  }

  // Turns queries and keys.
  template <int HELD>
  __device__ void turn(const Matrix& queries, const Matrix& keys, const Angles (&held)[HELD]) const {
    if (cosines == nullptr) return;
    const int word = threadIdx.x % HALF_WORDS, step = blockDim.x / HALF_WORDS;
    int token = threadIdx.x / HALF_WORDS;
#pragma unroll
    for (int i = 0; i < HELD; ++i, token += step) {
      if (token >= tokens) break;
      turn_word(queries.word(token, word), held[i]);
      turn_word(keys.word(token, word), held[i]);
    }
    for (; token < tokens; token += step) {
      const Angles by = angles(token, word);
      turn_word(queries.word(token, word), by);
      turn_word(keys.word(token, word), by);
    }
    __syncthreads();
  }

  // Writes a warp's 16 rows times the factors of the lane's two, by way of its rows `from ..` of a matrix. They are tokens
  // from `first` on, and turned back where they are gradients of queries or keys.
  template <bool TURNED>
  __device__ void write(
      const Heads& heads, int first, const SumsRow& sums, float2 factors, const Matrix& matrix, int from) const {
    const int lane = threadIdx.x % WARP, word = lane % HALF_WORDS;
    matrix.put(from, sums, factors.x, factors.y);
    __syncwarp();
#pragma unroll
    for (int own = lane / HALF_WORDS; own < ROWS_OF_WARP; own += WARP / HALF_WORDS) {
      const int token = first + own;
      if (token >= tokens) continue;
      const unsigned low = matrix.word(from + own, word), high = low ^ HALF_WORDS * Matrix::WORD_BYTES;
      if (TURNED && cosines != nullptr) turn_word(low, angles(token, word), -1.0f);
      bf16* const to = row(heads, token) + word * VECTOR;
      *reinterpret_cast<uint4*>(to) = Matrix::get_word(low);
      *reinterpret_cast<uint4*>(to + HEAD_WIDTH / 2) = Matrix::get_word(high);
    }
    __syncwarp();
  }

  // Asks for rows that a later block will read.
  __device__ void expect(const Heads& heads) const {
    for (int token = threadIdx.x; token < tokens; token += blockDim.x) {
      asm volatile("prefetch.global.L2 [%0];" ::"l"(row(heads, token)));
    }
  }

 private:
  // A word of a first half and its partner.
  __device__ static void turn_word(unsigned low, const Angles& by, float turn = 1.0f) {
    const unsigned high = low ^ HALF_WORDS * Matrix::WORD_BYTES;
    Vector first = unpack(Matrix::get_word(low)), second = unpack(Matrix::get_word(high));
    rotate(first, second, reinterpret_cast<const float*>(by.cosines), reinterpret_cast<const float*>(by.sines), turn);
    Matrix::put_word(low, pack(first));
    Matrix::put_word(high, pack(second));
  }
};

// The first rows of a warp's tiles in turn: to and fro, so that those with many and with few partners meet in one warp.
struct WarpTiles {
  int turn = 0;

  __device__ int first_row() const {
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP;
    return (turn * warps + (turn % 2 == 0 ? warp : warps - 1 - warp)) * ROWS_OF_WARP;
  }
};

__device__ float sum_of_quad(float value) { return sum_of_lanes(value, QUAD); }

__device__ float largest_of_quad(float value) {
  for (int step = QUAD / 2; step > 0; step /= 2) value = fmaxf(value, __shfl_xor_sync(ALL_LANES, value, step));
  return value;
}

// Adds to `sums` what 16 rows make with 16 rows of a matrix, at `at`, in a step of their values.
__device__ void add_products(Sums* sums, const LeftRow& left, unsigned at, int step) {
  const uint4 b = Matrix::rows(at, step);
  multiply(sums[0], left.at[step], b.x, b.y);
  multiply(sums[1], left.at[step], b.z, b.w);
}

// Adds to `sums` what `left`, 16 x 16, makes of 16 rows of a matrix.
__device__ void accumulate(SumsRow& sums, const Left& left, const Matrix& matrix, int first) {
  const unsigned at = matrix.columns_at(first);
#pragma unroll
  for (int step = 0; step < STEPS; ++step) {
    const uint4 b = Matrix::columns(at, step);
    multiply(sums.at[2 * step], left, b.x, b.y);
    multiply(sums.at[2 * step + 1], left, b.z, b.w);
  }
}

}  // namespace

extern "C" __global__ void __launch_bounds__(ATTENTION_THREADS, 2) m6_short_attention(ShortAttention given) {
  extern __shared__ uint4 memory[];
  const Example example(given, blockIdx.x);
  const unsigned size = example.rows() * Matrix::ROW_BYTES;
  const Matrix queries(memory), keys(queries.address + size), values(keys.address + size);
  example.fetch(queries, given.q);
  example.fetch(keys, given.k);
  example.fetch(values, given.v);
  // As many as there are where each warp has two tiles.
  Example::Angles angles[4];
  example.angles_of_thread(angles);
  Example::wait();
  example.turn(queries, keys, angles);
  const int lane = threadIdx.x % WARP;
  constexpr float FACTOR = SCALE * LOG2_E;
  constexpr int WIDE = ROWS_STEP / 16;
  for (WarpTiles tiles; tiles.first_row() < example.tokens; ++tiles.turn) {
    const int row = tiles.first_row();
    const LeftRow own_queries = queries.left(row);
    const int own[2] = {row + lane / QUAD, row + lane / QUAD + 8};
    const int last = example.last_seen(row + ROWS_OF_WARP - 1);
    SumsRow out = {};
    float largest[2] = {LOWEST, LOWEST}, total[2] = {};
    for (int first = 0; first <= last; first += ROWS_STEP) {
      Sums scores[2 * WIDE] = {};
      const unsigned keys_at = keys.rows_at(first);
#pragma unroll
      for (int step = 0; step < STEPS; ++step) {
#pragma unroll
        for (int i = 0; i < WIDE; ++i) {
          add_products(scores + 2 * i, own_queries, keys_at + i * 16 * Matrix::ROW_BYTES, step);
        }
      }
      if (first + ROWS_STEP - 1 > example.last_seen(row)) {
#pragma unroll
        for (int i = 0; i < 2 * WIDE; ++i) {
#pragma unroll
          for (int at = 0; at < 4; ++at) {
            const int key = first + i * 8 + lane % QUAD * 2 + at % 2;
            if (key > example.last_seen(own[at / 2])) scores[i].at[at] = -INFINITY;
          }
        }
      }
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float above = largest[half];
#pragma unroll
        for (int i = 0; i < 2 * WIDE; ++i) {
          above = fmaxf(above, fmaxf(scores[i].at[2 * half], scores[i].at[2 * half + 1]));
        }
        above = largest_of_quad(above);
        const float shrink = power_of_two((largest[half] - above) * FACTOR);
        largest[half] = above;
        total[half] *= shrink;
#pragma unroll
        for (int i = 0; i < COLUMNS; ++i) {
          out.at[i].at[2 * half] *= shrink;
          out.at[i].at[2 * half + 1] *= shrink;
        }
        const float shift = above * FACTOR;
#pragma unroll
        for (int i = 0; i < 2 * WIDE; ++i) {
#pragma unroll
          for (int at = 2 * half; at < 2 * half + 2; ++at) {
            scores[i].at[at] = power_of_two(fmaf(scores[i].at[at], FACTOR, -shift));
            total[half] += scores[i].at[at];
          }
        }
      }
#pragma unroll
      for (int i = 0; i < WIDE; ++i) {
        accumulate(out, as_left(scores[2 * i], scores[2 * i + 1]), values, first + i * 16);
      }
    }
    const float sums[2] = {sum_of_quad(total[0]), sum_of_quad(total[1])};
    // In the place of the queries, which no other warp reads.
    example.write<false>(given.out, row, out, {1.0f / sums[0], 1.0f / sums[1]}, queries, row);
    if (lane % QUAD == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (own[half] >= example.tokens) continue;
        given.log_sums[example.head * given.n + example.start + own[half]] = largest[half] * FACTOR + log2f(sums[half]);
      }
    }
  }
}

namespace {

// What the backward pass has of a head in shared memory.
struct GradMemory {
  Matrix queries, keys, values, douts;
  // Results, and once their products are summed, rows for each warp from `own_row` on.
  Matrix outs;
  int own_row;
  // For each token the logarithm of its sum, and the sum over its result's values times their gradients.
  float *log_sums, *products;

  __device__ GradMemory(bf16* memory, int rows)
      : queries(memory),
        keys(memory + rows * HEAD_WIDTH),
        values(memory + 2 * rows * HEAD_WIDTH),
        douts(memory + 3 * rows * HEAD_WIDTH),
        outs(memory + 4 * rows * HEAD_WIDTH),
        own_row(threadIdx.x / WARP * ROWS_OF_WARP),
        log_sums(reinterpret_cast<float*>(memory + 5 * rows * HEAD_WIDTH)),
        products(log_sums + rows) {}
};

// Sums over results' values times their gradients.
__device__ void sum_products(const Example& example, const GradMemory& memory) {
  const int word = threadIdx.x % WORDS, step = blockDim.x / WORDS;
  for (int token = threadIdx.x / WORDS; token < example.rows(); token += step) {
    const Vector dy = unpack(Matrix::get_word(memory.douts.word(token, word)));
    const Vector y = unpack(Matrix::get_word(memory.outs.word(token, word)));
    float product = 0;
#pragma unroll
    for (int i = 0; i < VECTOR; ++i) product += dy.at[i] * y.at[i];
    product = sum_of_lanes(product, WORDS);
    if (word == 0) memory.products[token] = product;
  }
}

// Scores of 16 rows with 16 of others, and the gradients of their weights.
struct Scores {
  Sums of[2] = {}, grads[2] = {};

  __device__ Scores(
      const LeftRow& left, const Matrix& right, const LeftRow& left_grads, const Matrix& right_grads, int first) {
    const unsigned at = right.rows_at(first), grads_at = at - right.address + right_grads.address;
#pragma unroll
    for (int step = 0; step < STEPS; ++step) {
      add_products(of, left, at, step);
      add_products(grads, left_grads, grads_at, step);
    }
  }
};

// The weight of a score, and its gradient in the place of that of the weight.
__device__ float weigh(float score, float& dscore, float log_sum, float product, bool is_seen) {
  const float weight = is_seen ? power_of_two(fmaf(score, SCALE * LOG2_E, -log_sum)) : 0.0f;
  dscore = weight * (dscore - product);
  return weight;
}

// Of 16 keys and values.
__device__ void grad_keys(const Example& example, const GradMemory& memory, const ShortAttentionGrads& grads, int row) {
  const int lane = threadIdx.x % WARP;
  const LeftRow keys = memory.keys.left(row), values = memory.values.left(row);
  SumsRow dkeys = {}, dvalues = {};
  for (int first = row < example.prefix ? 0 : row; first < example.tokens; first += 16) {
    Scores scores(keys, memory.queries, values, memory.douts, first);
    const bool whole = row + ROWS_OF_WARP - 1 <= example.last_seen(first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int query = first + i * 8 + lane % QUAD * 2;
      const float2 log_sum = *reinterpret_cast<const float2*>(memory.log_sums + query);
      const float2 product = *reinterpret_cast<const float2*>(memory.products + query);
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const bool is_seen = whole || row + lane / QUAD + at / 2 * 8 <= example.last_seen(query + at % 2);
        float &score = scores.of[i].at[at], &grad = scores.grads[i].at[at];
        score = at % 2 == 0 ? weigh(score, grad, log_sum.x, product.x, is_seen)
                            : weigh(score, grad, log_sum.y, product.y, is_seen);
      }
    }
    accumulate(dvalues, as_left(scores.of[0], scores.of[1]), memory.douts, first);
    accumulate(dkeys, as_left(scores.grads[0], scores.grads[1]), memory.queries, first);
  }
  example.write<false>(grads.v, row, dvalues, {1.0f, 1.0f}, memory.outs, memory.own_row);
  example.write<true>(grads.k, row, dkeys, {SCALE, SCALE}, memory.outs, memory.own_row);
}

// Of 16 queries.
__device__ void grad_queries(const Example& example, const GradMemory& memory, const ShortAttentionGrads& grads, int row) {
  const int lane = threadIdx.x % WARP;
  const LeftRow queries = memory.queries.left(row), douts = memory.douts.left(row);
  const int own[2] = {row + lane / QUAD, row + lane / QUAD + 8};
  const float log_sum[2] = {memory.log_sums[own[0]], memory.log_sums[own[1]]};
  const float product[2] = {memory.products[own[0]], memory.products[own[1]]};
  SumsRow dqueries = {};
  const int last = example.last_seen(row + ROWS_OF_WARP - 1);
  for (int first = 0; first <= last; first += 16) {
    Scores scores(queries, memory.keys, douts, memory.values, first);
    const bool whole = first + 15 <= example.last_seen(row);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int at = 0; at < 4; ++at) {
        const bool is_seen = whole || first + i * 8 + lane % QUAD * 2 + at % 2 <= example.last_seen(own[at / 2]);
        weigh(scores.of[i].at[at], scores.grads[i].at[at], log_sum[at / 2], product[at / 2], is_seen);
      }
    }
    accumulate(dqueries, as_left(scores.grads[0], scores.grads[1]), memory.keys, first);
  }
  example.write<true>(grads.q, row, dqueries, {SCALE, SCALE}, memory.outs, memory.own_row);
}

}  // namespace

extern "C" __global__ void __launch_bounds__(ATTENTION_GRAD_THREADS) m6_short_attention_grad(
    ShortAttention given, ShortAttentionGrads grads) {
  extern __shared__ uint4 memory_of_block[];
  const Example example(given, blockIdx.x);
  const GradMemory memory(reinterpret_cast<bf16*>(memory_of_block), example.rows());
  example.fetch(memory.douts, grads.out);
  example.fetch(memory.outs, given.out);
  example.fetch(memory.queries, given.q);
  example.fetch(memory.keys, given.k);
  example.fetch(memory.values, given.v);
  for (int token = threadIdx.x; token < example.rows(); token += blockDim.x) {
    const bool inside = token < example.tokens;
    // Past the example, what makes the weights zero.
    memory.log_sums[token] = inside ? given.log_sums[example.head * given.n + example.start + token] : -LOWEST;
  }
  // As many as there are where each warp has one tile.
  Example::Angles angles[2];
  example.angles_of_thread(angles);
  Example::wait();
  sum_products(example, memory);
  example.turn(memory.queries, memory.keys, angles);
  __syncthreads();
  // One block's data fill the memory, so its successor's come at least into the cache meanwhile.
  if (const int later = blockIdx.x + given.running; later < given.blocks) {
    const Example next(given, later);
    for (const Heads& heads : {given.q, given.k, given.v, given.out, grads.out}) next.expect(heads);
  }
  for (WarpTiles tiles; tiles.first_row() < example.tokens; ++tiles.turn) {
    grad_keys(example, memory, grads, tiles.first_row());
    grad_queries(example, memory, grads, tiles.first_row());
  }
}
