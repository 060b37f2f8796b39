// Exit scores of one row of logits z [C], formula by formula as in ops/reference/scores.py, NaN behaviour included:
// a NaN among the logits reaches every total, and so every score.

namespace ragged_exit {
namespace RX_ISA {

// f(vector, lanes that count) over n numbers.
template <typename F>
RX_INLINE void each_vector(const float* z, int64_t n, F f) {
    int64_t i = 0;
    for (; i + kWidth <= n; i += kWidth) f(load(z + i), static_cast<int64_t>(kWidth));
    if (i < n) f(load_n(z + i, n - i), n - i);
}

// A sum whose error grows with the square root of its length at worst: parts of 32 vectors, and the sum of the parts.
struct LongSum {
    Vec part, parts;
    int in_part;
    RX_INLINE LongSum() : part(zero()), parts(zero()), in_part(0) {}  // written out: a default one has no vector target
    RX_INLINE void add(Vec x) {
        part = part + x;
        if (++in_part == 32) {
            parts = parts + part;
            part = zero();
            in_part = 0;
        }
    }
    RX_INLINE float total() const { return sum(parts + part); }
};

inline float largest_of(const float* z, int64_t n) {  // ignores NaN
    Vec best = set1(-INFINITY);
    each_vector(z, n, [&](Vec x, int64_t count) { best = max(first_n(count, x, set1(-INFINITY)), best); });
    return largest(best);
}

// S = sum e^(z - max z), and sum f(z - max z, e^(z - max z)) of the same lanes.
struct Softmax {
    float top, total, log_total;
    Softmax(const float* z, int64_t n) : top(largest_of(z, n)) {
        LongSum sums;
        each_vector(z, n, [&](Vec x, int64_t count) { sums.add(first_n(count, exp(x - set1(top)), zero())); });
        total = sums.total();
        log_total = std::log(total);
    }
    template <typename F>
    float add_up(const float* z, int64_t n, F f) const {
        LongSum sums;
        each_vector(z, n, [&](Vec x, int64_t count) {
            const Vec shifted = x - set1(top);
            sums.add(first_n(count, f(shifted, exp(shifted)), zero()));
        });
        return sums.total();
    }
};

inline float entropy_exact(const float* z, int64_t n) {
    const Softmax softmax(z, n);
    const float mean = softmax.add_up(z, n, [&](Vec shifted, Vec weight) {
        return if_less(zero(), weight, weight * shifted, zero());  // 0 ln 0 = 0
    });
    const float nats = softmax.log_total - mean / softmax.total;
    return nats < 0.0f ? 0.0f : nats;
}

inline float entropy_hf(const float* z, int64_t n) {
    LongSum weights, weighted;
    each_vector(z, n, [&](Vec x, int64_t count) {
        const Vec weight = exp(x);
        weights.add(first_n(count, weight, zero()));
        weighted.add(first_n(count, x * weight, zero()));
    });
    const float total = weights.total();
    return std::log(total) - weighted.total() / total;
}

inline float entropy_castorini(const float* z, int64_t n) {
    const Softmax softmax(z, n);
    return -softmax.add_up(z, n, [&](Vec shifted, Vec weight) {
        const Vec p = weight / set1(softmax.total);
        return if_less(zero(), p, p * (shifted - set1(softmax.log_total)), set1(NAN));  // 0 ln 0 = NaN
    });
}

inline float entropy_categorical(const float* z, int64_t n) {
    const Softmax softmax(z, n);
    const float total = -softmax.add_up(z, n, [&](Vec shifted, Vec weight) {
        const Vec log_p = shifted - set1(softmax.log_total);
        const Vec low = set1(-15.9423851f), high = set1(-1.19209297e-7f);  // ln eps and ln(1 - eps), eps = 2^-23
        return weight / set1(softmax.total) * min(high, max(low, log_p));
    });
    return total / std::log(static_cast<float>(n));  // one class: inf, as in the reference
}

inline float entropy_normalised(const float* z, int64_t n) {
    return entropy_exact(z, n) / std::log(static_cast<float>(n));  // one class: 0 / 0 = NaN
}

inline float max_prob(const float* z, int64_t n, float temperature) {
    const float top = largest_of(z, n) / temperature;
    LongSum sums;
    each_vector(z, n, [&](Vec x, int64_t count) {
        sums.add(first_n(count, exp(x / set1(temperature) - set1(top)), zero()));
    });
    return 1.0f / sums.total();
}

inline float energy(const float* z, int64_t n, float temperature) {
    LongSum sums;
    each_vector(z, n, [&](Vec x, int64_t count) { sums.add(first_n(count, exp(x / set1(temperature)), zero())); });
    return 1.0f / (1.0f + std::pow(sums.total(), temperature));
}

inline bool has_nan(const float* z, int64_t n) {
    bool found = false;
    for (int64_t i = 0; i < n; ++i) found |= z[i] != z[i];
    return found;
}

// The first place of the largest number other than z[skip], which counts as -inf.
inline int64_t argmax(const float* z, int64_t n, int64_t skip) {
    int64_t place = 0;
    float best = -INFINITY;
    for (int64_t i = 0; i < n; ++i) {
        if (z[i] > best && i != skip) {
            best = z[i];
            place = i;
        }
    }
    return place;
}

inline float distance_ratio(const float* z, const float* distances, int64_t n, bool by_distance) {
    float near, far;
    if (by_distance) {
        near = far = NAN;  // a NaN counts as farthest
        for (int64_t i = 0; i < n; ++i) {
            const float distance = distances[i];
            if (distance < near || near != near) {
                far = near;
                near = distance;
            } else if (distance < far || far != far) {
                far = distance;
            }
        }
    } else {
        const int64_t first = argmax(z, n, -1);
        near = distances[first];
        far = distances[argmax(z, n, first)];
    }
    if (near != near || far != far) return NAN;
    const float span = near > far ? near : far;
    return span == 0.0f ? 0.5f : (1.0f + (near - far) / span) / 2.0f;
}

inline float distance_entropy(const float* z, const float* distances, int64_t n, float lam, bool by_distance) {
    const float spread = entropy_normalised(z, n), ratio = distance_ratio(z, distances, n, by_distance);
    const float weight = lam * spread + ratio;
    return weight == 0.0f ? 0.0f : (lam + 1.0f) * ratio * spread / weight;
}

// The updated patience state of a row and its score, the counter.
inline float count_patience(const ExitArgs& a, int64_t row, const float* z) {
    const float before = a.previous[row];
    float current = before;
    bool agrees;
    if (a.score == Score::confident_patience) {
        agrees = entropy_categorical(z, a.classes) < a.tolerance;
    } else if (a.classes == 1) {
        current = z[0];
        agrees = std::fabs(before - current) < a.tolerance;
    } else {
        current = static_cast<float>(argmax(z, a.classes, -1));
        agrees = current == before;
    }
    const bool broken = has_nan(z, a.classes);
    const int32_t count = agrees && !broken ? a.counter[row] + 1 : 0;
    a.new_counter[row] = count;
    a.new_previous[row] = broken ? NAN : current;  // nothing agrees with a NaN row next time
    return static_cast<float>(count);
}

inline bool passes(Compare compare, float score, float threshold) {  // false for NaN
    switch (compare) {
        case Compare::less: return score < threshold;
        case Compare::less_equal: return score <= threshold;
        case Compare::greater: return score > threshold;
        default: return score >= threshold;
    }
}

// Score, state and exit of a row whose logits lie in a.logits; signal: its uncertainty or its distances [classes].
inline void decide_row(const ExitArgs& a, int64_t row, const float* signal) {
    const float* z = a.logits + row * a.classes;
    float score = 0.0f;
    switch (a.score) {
        case Score::entropy_exact: score = entropy_exact(z, a.classes); break;
        case Score::entropy_hf: score = entropy_hf(z, a.classes); break;
        case Score::entropy_castorini: score = entropy_castorini(z, a.classes); break;
        case Score::entropy_categorical: score = entropy_categorical(z, a.classes); break;
        case Score::entropy_normalised: score = entropy_normalised(z, a.classes); break;
        case Score::max_prob: score = max_prob(z, a.classes, a.temperature); break;
        case Score::energy: score = energy(z, a.classes, a.temperature); break;
        case Score::uncertainty: score = *signal; break;
        case Score::patience:
        case Score::confident_patience: score = count_patience(a, row, z); break;
        case Score::distance_entropy:
            score = distance_entropy(z, signal, a.classes, a.lam, a.dr_by_distance);
            break;
    }
    const bool early = passes(a.compare, score, a.threshold[a.per_row_threshold ? row : 0]);
    a.out_score[row] = score;
    a.exits[row] = a.final || early;
}

// A row past the live ones: zeros, and the state that a row of zeros leaves.
inline void decide_dead_row(const ExitArgs& a, int64_t row) {
    float* z = a.logits + row * a.classes;
    std::memset(z, 0, a.classes * sizeof(float));
    if (a.counter) count_patience(a, row, z);
    a.out_score[row] = 0.0f;
    a.exits[row] = false;
}

}  // namespace RX_ISA
}  // namespace ragged_exit
