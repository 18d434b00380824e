#include "read_rows.h"

#include <algorithm>

#include "numbers.h"
#include "parallel.h"

namespace ffn {

constexpr std::int64_t kRows = 32;  // that a thread takes at a time

void read_rows(const Reading& r, const Isa& isa, int threads) {
    threads = useful_threads(std::max(threads, 1), r.count * r.format.width);
    const auto part = [&](int i) {
        for (std::int64_t n = i * kRows; n < std::min((i + 1) * kRows, r.count); ++n) {
            const char* to = element(r.to, r.dtype, n * r.format.width);
            isa.read_row(r.rows + n * r.stride, r.format, r.dtype, const_cast<char*>(to));
        }
    };
    in_parallel(threads, Loop{int((r.count + kRows - 1) / kRows), part});
}

}  // namespace ffn
