// The kernels' arguments: raw pointers with their shapes and strides, checked by Python (ops/native.py) before the call.
//
// Every kernel exists once per instruction set (see dispatch.cpp). Strides count elements, not bytes. "T" in a comment is
// float, or Bf16 where `bf16` is set; all arithmetic is in float.
#pragma once

#include <cstdint>
#include <new>

namespace ragged_exit {

struct Bf16 {
    uint16_t bits;
};

struct AttentionArgs {
    const void *q, *k, *v;      // T [tokens, heads, dim], dim contiguous
    void* out;                  // T [tokens, heads, dim], contiguous
    const int32_t* cu_seqlens;  // [rows + 1]
    int64_t rows, tokens, heads, dim;
    int64_t q_token, q_head, k_token, k_head, v_token, v_head;  // strides
    float scale;
    bool bf16;
    int threads;
};

struct LayerNormArgs {
    const void* x;         // T [tokens, width], rows `x_stride` apart
    const void* residual;  // the same with `residual_stride`, or null
    const void *weight, *bias;  // T [width]
    void* out;                  // T [tokens, width], contiguous
    int64_t tokens, width, x_stride, residual_stride;
    float eps;
    bool uer;  // unbiased standard deviation, eps added to it
    bool bf16;
    int threads;
};

// Tables are T [*, width], contiguous; the ids have been checked against them.
struct EmbedArgs {
    const int64_t *input_ids, *position_ids;  // [tokens]
    const int64_t* token_type_ids;            // the same, or null: all 0
    const void *word, *position;
    const void* token_type;     // or null
    const void *weight, *bias;  // T [width]
    void* out;                  // T [tokens, width], contiguous
    int64_t tokens, width;
    float eps;
    bool uer;
    bool bf16;
    int threads;
};

enum class Score {
    entropy_exact,
    entropy_hf,
    entropy_castorini,
    entropy_categorical,
    entropy_normalised,
    max_prob,
    energy,
    uncertainty,
    patience,
    confident_patience,
    distance_entropy,
};

enum class Compare { less, less_equal, greater, greater_equal };

// What an exit decides with, and its outputs: shared by exit_step and exit_decide.
struct ExitArgs {
    const int32_t* cu_seqlens;  // [rows + 1]
    int64_t rows, live_rows, classes;
    Score score;
    Compare compare;
    float tolerance, temperature, lam;
    bool dr_by_distance;  // else the two likeliest classes
    bool final;
    const int32_t* counter;   // [rows], or null where the score keeps no state
    const float* previous;    // [rows], or null
    const float* threshold;   // [rows] where per_row_threshold, else [1]
    bool per_row_threshold;
    float* logits;            // [rows, classes]
    float* out_score;         // [rows]
    bool* exits;              // [rows]
    int32_t* survivors;       // [rows]
    int32_t* new_cu_seqlens;  // [rows + 1]
    int32_t* new_live;        // [2]
    int32_t* new_counter;     // [rows], or null
    float* new_previous;      // [rows], or null
    bool bf16;
    int threads;
};

// The mean of each row's tokens; zeros for a row without any.
struct MeanArgs {
    const void* hidden;         // T [tokens, width], contiguous
    const int32_t* cu_seqlens;  // [rows + 1]
    float* out;                 // [rows, width]
    int64_t rows, width;
    bool bf16;
    int threads;
};

// Weights are T, but for a packed pooler; a null pointer is an absent tensor.
struct HeadArgs {
    const void* hidden;  // T [tokens, width], rows `hidden_stride` apart
    int64_t hidden_stride, width;
    bool mean;                      // pool the mean of a row's tokens, else its first token
    const float* means;             // [rows, width], where they are known already
    const void* pooler;             // [pooled, width], or packed as a linear's in float (LinearArgs)
    const void* pooler_bias;        // [pooled]
    const void* classifier;         // [classes, pooled]
    const void* classifier_bias;    // [classes]
    const void* uncertainty;        // [pooled]
    const void* uncertainty_bias;   // [1]
    const void* projection;         // [projected, width]
    const void* projection_bias;    // [projected]
    const void* prototypes;         // [classes, projected]
    int64_t pooled, projected;
    bool pooler_packed;
};

struct DecideArgs {
    const void* logits;   // T [rows, classes], contiguous
    const float* signal;  // [rows] uncertainty or [rows, classes] distances, or null
};

// A linear whose weights are packed; inputs and outputs are positive multiples of 32.
//
// Weights lie in panels of 32 outputs, a panel in steps of 32 inputs. A step is [parts, 2, 32 / of, 16, of]: halves of 16
// outputs, whose weights for `of` inputs stand together. For tiles, and for vectors in Bf16, the numbers are Bf16 and `of`
// is 2; float has three parts, whose sum is the weight, else there is one. For vectors in float they are floats, `of` is 1.
struct LinearArgs {
    const void* x;          // T [tokens, inputs], rows `x_stride` apart
    const void* weights;    // panels [outputs / 32, inputs / 32]
    int64_t panel_steps;    // from one panel to the next: more than there are here where x has only some of the inputs
    const float* bias;      // [outputs], or null: 0
    const void* residual;   // T [tokens, outputs], rows `out_stride` apart, or null; may be `out`
    void* out;              // T [tokens, outputs], rows `out_stride` apart
    int64_t tokens, inputs, outputs, x_stride, out_stride;
    bool gelu;  // not together with a residual
    bool bf16;
    int threads;
};
using LinearKernel = void (*)(const LinearArgs&);

// What may follow a linear besides the GELU of its own, over all that it wrote.
enum class Activation { tanh_gelu, silu, tanh };

struct Kernels {
    void (*attention)(const AttentionArgs&);
    void (*layer_norm)(const LayerNormArgs&);
    void (*embed_layer_norm)(const EmbedArgs&);
    void (*mean_rows)(const MeanArgs&);
    void (*exit_step)(const HeadArgs&, const ExitArgs&);
    void (*exit_decide)(const DecideArgs&, const ExitArgs&);
    LinearKernel linear;  // in float, or null
    void (*activate)(void* x, int64_t n, Activation activation, bool bf16, int threads);  // in place; n: 32, 64, ...
    // The functions of math.inl.h over arrays of n floats, for accuracy tests.
    void (*exp)(const float* x, float* y, int64_t n);
    void (*exp2)(const float* x, float* y, int64_t n);
    void (*tanh)(const float* x, float* y, int64_t n);
};

// The best set for this processor, or the one that RAGGED_EXIT_ISA names. Throws std::runtime_error for a name that is
// unknown or that this processor cannot run.
const Kernels& kernels();
const char* isa();  // its name; "amx": AVX-512 with matrix tiles

struct GatherTensor {
    const char* source;
    char* target;
    int64_t item_bytes;
};

struct CompactArgs {
    const int32_t* survivors;       // [>= live_rows]
    const int32_t* cu_seqlens;      // of the input
    const int32_t* new_cu_seqlens;  // of the survivors
    int64_t live_rows, token_capacity, row_capacity;
    int threads;
};

// Gathers the survivors' tokens and rows; what is left of each target is zeroed.
void compact(const CompactArgs& args, const GatherTensor* tokens, int64_t token_count, const GatherTensor* rows,
             int64_t row_count);

// Fills survivors, new_cu_seqlens and new_live from exits.
void plan_survivors(const ExitArgs& args);

// The kernels of linears for the dtype and the processor, and whether there are any.
bool linears_available(bool bf16);
void linear(const LinearArgs& args);
void bf16_linear(const LinearArgs& args);  // on vectors
bool bf16_vectors_available();             // and chosen
int64_t linear_step_bytes(bool bf16);  // of a panel's weights for 32 inputs

// Of how many inputs at a time tiles write the sums: of all, or where floats have many, of 384 (tiles_linear_float.inl.h).
constexpr int64_t tile_chunk(int64_t inputs, bool bf16) { return bf16 || inputs <= 1024 ? inputs : 384; }

// Whether processor and operating system grant the kernels on matrix tiles, and whether they are chosen, too.
bool tiles_granted();
bool tiles_available();
void tile_linear(const LinearArgs& args);
void tile_attention(const AttentionArgs& args);  // bfloat16, `dim` a multiple of 32

// The kernel of attention for the dtype, the head size and the processor.
void attention(const AttentionArgs& args);

// A post-LayerNorm layer with a GELU, whose linears are packed.
struct LayerArgs {
    struct Linear {
        const void* weights;  // as in LinearArgs
        const float* bias;
    };
    struct Norm {
        const void *weight, *bias;  // T [width]
    };
    void* hidden;               // T [tokens, width], contiguous: in and out; tokens past the last row's are left alone
    float* means;               // [rows, width]: of each row's tokens as they leave the layer, or null
    const int32_t* cu_seqlens;  // [rows + 1]
    int64_t rows, width, heads, inner;
    Linear qkv, attention_output, feed_forward_up, feed_forward_down;
    Norm attention_norm, output_norm;
    float eps;
    bool uer;  // of both norms, as in LayerNormArgs
    bool bf16;
    int threads;
};
void layer(const LayerArgs& args);

// What the layers' time went into since this was last asked: for a profile, while no layer runs.
struct LayerSeconds {
    double linears, attention, norms;
};
LayerSeconds take_layer_seconds();

// A buffer of at least `floats`, 64-byte aligned, that belongs to the calling thread until its next call for the same use:
// kernels run thousands of times on similar sizes, and fresh pages would cost more than the small ones compute. Who calls
// other kernels keeps what is its own in a buffer that they leave alone.
enum class Use { kernel, caller };
float* workspace(int64_t floats, Use use = Use::kernel);

// For parallel regions in which a workspace may grow: an exception that left one would end the process. Its threads
// attempt(), and rethrow() follows the region.
class OutOfMemory {
    bool caught = false;

   public:
    template <typename Body>
    void attempt(const Body& body) {
        try {
            body();
        } catch (const std::bad_alloc&) {
#pragma omp atomic write
            caught = true;
        }
    }
    void rethrow() const;
};

}  // namespace ragged_exit
