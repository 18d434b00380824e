// Memory for the intermediate results of one call, kept for the next call of the same thread.
#pragma once

#include <cstddef>
#include <new>

namespace ffn {

class Scratch {
  public:
    ~Scratch() { release(); }

    // At least `bytes`, on a cache line, with anything in it.
    std::byte* get(std::size_t bytes) {
        if (bytes > size_) {
            release();
            data_ = static_cast<std::byte*>(::operator new(bytes, kAlignment));
            size_ = bytes;
        }
        return data_;
    }

  private:
    static constexpr std::align_val_t kAlignment{64};

    void release() {
        if (data_) ::operator delete(data_, kAlignment);
        data_ = nullptr;
        size_ = 0;
    }

    std::byte* data_ = nullptr;
    std::size_t size_ = 0;
};

}  // namespace ffn
