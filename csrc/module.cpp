// The pybind11 module `_C`: how the kernels were built and which instruction set this process uses.
// Nothing else; the kernels are a plain shared library that torch.ops.load_library loads.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, module) {
  module.doc() = "Build facts of the compiled kernels.";
  module.def(
      "build_facts",
      [] {
        pybind11::dict facts;
        facts["version"] = BUILD_VERSION;
        facts["compiler"] = BUILD_COMPILER;
        facts["build_type"] = BUILD_TYPE;
        facts["sanitize"] = BUILD_SANITIZE;
        facts["instruction_sets"] = BUILD_INSTRUCTION_SETS;
        facts["cuda"] = BUILD_CUDA;
        facts["cuda_architectures"] = BUILD_CUDA_ARCHITECTURES;
        return facts;
      },
      "How the kernels were built, as a dict of strings.");
  module.def(
      "instruction_set",
      [] { return std::string(regularizers::isa_name(regularizers::chosen_isa())); },
      "The instruction set that the CPU kernels of this process use.");
}
