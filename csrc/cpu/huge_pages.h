// Large pages for large results.
#pragma once

#include <cstdint>

namespace adazeta {

// Asks the system to back fresh memory of `bytes` bytes by large pages, which it hands out and clears many times faster
// than small ones: without, an op that allocates a large result spends most of its time there. Best effort, and nothing
// for results below 16 MiB, whose memory the allocator mostly has at hand.
void prefer_huge_pages(void* data, int64_t bytes);

}  // namespace adazeta
