// What the code of a subgraph needs: vectors for its kernels, and torch's C interface for the function that calls them.
#pragma once

#include <torch/csrc/inductor/cpp_prefix.h>

#include <torch/csrc/inductor/aoti_runtime/device_utils.h>
#include <torch/csrc/inductor/aoti_runtime/scalar_to_tensor.h>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/cpp_wrapper/device_internal/cpu.h>

#include <iostream>

// The operators of sums and gathers over ranks (collectives.py), which torch's dispatcher calls. It takes its arguments over.
inline AOTITorchError aoti_torch_cpu_all_reduce(AtenTensorHandle x, AtenTensorHandle* out) {
    AtenTensorHandle own = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x, &own));
    StableIValue stack[] = {reinterpret_cast<StableIValue>(own)};
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("tandem::all_reduce", "", stack));
    *out = reinterpret_cast<AtenTensorHandle>(stack[0]);
    return AOTI_TORCH_SUCCESS;
}

inline AOTITorchError aoti_torch_cpu_all_gather(AtenTensorHandle x, int64_t ranks, AtenTensorHandle* out) {
    AtenTensorHandle own = nullptr;
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(x, &own));
    StableIValue stack[] = {reinterpret_cast<StableIValue>(own), static_cast<StableIValue>(ranks)};
    AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_call_dispatcher("tandem::all_gather", "", stack));
    *out = reinterpret_cast<AtenTensorHandle>(stack[0]);
    return AOTI_TORCH_SUCCESS;
}

namespace tandem {

// An input of a subgraph, which the caller keeps. Inductor's function would take its inputs over, so that each call needed
// a new handle for each of them.
struct Borrowed {
    AtenTensorHandle handle;
    operator AtenTensorHandle() const { return handle; }
    AtenTensorHandle get() const { return handle; }
    void reset() {}
    void* data_ptr() const {
        void* data = nullptr;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_get_data_ptr(handle, &data));
        return data;
    }
    AtenTensorHandle release() const {  // an input that is returned
        AtenTensorHandle kept = nullptr;
        AOTI_TORCH_ERROR_CODE_CHECK(aoti_torch_new_tensor_handle(handle, &kept));
        return kept;
    }
};

struct Inputs {
    const AtenTensorHandle* handles;
    Borrowed operator[](size_t n) const { return {handles[n]}; }
    void clear() {}
};

}  // namespace tandem
