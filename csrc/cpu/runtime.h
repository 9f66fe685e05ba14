// Threads and scratch memory for the kernels. Declared without templates, so that nothing of the standard library or
// of torch is compiled inside the files that target one instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

namespace mixrank {

using RangeFn = void (*)(int64_t begin, int64_t end, void* context);

// Calls fn on disjoint ranges that cover [0, count), on torch's threads; serial inside another parallel_for.
void parallel_for(int64_t count, int64_t grain, RangeFn fn, void* context);
int64_t num_threads();

// Who uses a piece of scratch: a thread that runs a whole call and also works in its parallel regions needs both.
enum class Scratch { kCall, kFactors, kWorker, kRows, kCount };

// At least `bytes` of uninitialised memory, aligned to 64 bytes, of the calling thread: valid until that thread asks
// for the same slot again. It grows to the largest request and is freed with the thread.
void* scratch(Scratch slot, size_t bytes);

}  // namespace mixrank
