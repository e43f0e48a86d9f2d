#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include "inputs.h"
#include "steps.h"

namespace arl {

PyObject* fast_unpack(PyObject*, PyObject* object) {
  HANDLE_TH_ERRORS
  const at::Tensor* packed = plain(object);
  if (packed == nullptr || packed->dim() != 1 || !packed->is_contiguous() || !no_mode_intercepts()) {
    Py_RETURN_NONE;
  }
  const int fixed = packed_length(0), per_modality = packed_length(1) - fixed;  // the length is linear in M
  const int modalities = int(packed->size(0) - fixed) / per_modality;
  PyObject* parts = PyTuple_New(kPackedLink);  // the statistics are the fields before the link
  if (parts == nullptr) return nullptr;
  int64_t first = 0;
  for (int field = 0; field < kPackedLink; ++field) {
    const PackedField& rows = kPacked[field];
    const int64_t size = rows.per_branch * (modalities + 1) + rows.per_modality * modalities;
    PyObject* part = THPVariable_Wrap(part_of(*packed, first, {size}));
    if (part == nullptr) {
      Py_DECREF(parts);
      return nullptr;
    }
    PyTuple_SET_ITEM(parts, field, part);
    first += size;
  }
  return parts;
  END_HANDLE_TH_ERRORS
}

}  // namespace arl
