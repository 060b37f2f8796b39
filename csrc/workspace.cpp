#include <cstdlib>
#include <new>

#include "kernels.h"

namespace ragged_exit {

namespace {

struct Buffer {
    float* data = nullptr;
    int64_t capacity = 0;
    ~Buffer() { std::free(data); }
};

thread_local Buffer buffers[2];

}  // namespace

float* workspace(int64_t floats, Use use) {
    Buffer& buffer = buffers[static_cast<int>(use)];
    if (floats > buffer.capacity) {
        std::free(buffer.data);
        buffer.capacity = 0;
        const int64_t rounded = (floats + 1023) / 1024 * 1024;
        buffer.data = static_cast<float*>(std::aligned_alloc(64, rounded * sizeof(float)));
        if (buffer.data == nullptr) throw std::bad_alloc();
        buffer.capacity = rounded;
    }
    return buffer.data;
}

void OutOfMemory::rethrow() const {
    if (caught) throw std::bad_alloc();
}

}  // namespace ragged_exit
