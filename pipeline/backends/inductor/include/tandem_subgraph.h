// What the code of a subgraph needs: vectors for its kernels, and torch's C interface for the function that calls them.
#pragma once

#include <torch/csrc/inductor/cpp_prefix.h>

#include <torch/csrc/inductor/aoti_runtime/device_utils.h>
#include <torch/csrc/inductor/aoti_runtime/scalar_to_tensor.h>
#include <torch/csrc/inductor/aoti_runtime/utils.h>
#include <torch/csrc/inductor/cpp_wrapper/device_internal/cpu.h>

#include <iostream>
