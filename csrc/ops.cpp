#include "ops.h"

#include <torch/library.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <mutex>
#include <sstream>
#include <string>

#include "cpu/forward.h"

namespace arl {

Results forward(at::TensorList logits, const Targets& targets, const Schedule& schedule,
                const Options& options, bool grad) {
  cpu::Inputs inputs;
  for (const at::Tensor& x : logits) inputs.logits.push_back(&x);
  inputs.targets = targets;
  inputs.numbers = cpu::read(schedule);
  inputs.wanted = grad ? ~uint64_t(0) : 0;
  cpu::Outputs outputs = cpu::forward(inputs, options);
  std::vector<at::Tensor> grads;
  if (grad) grads.assign(outputs.grads.begin(), outputs.grads.end());
  return {std::move(outputs.loss), std::move(outputs.packed), std::move(grads)};
}

std::vector<at::Tensor> scale(at::TensorList grads, const at::Tensor& upstream,
                              const std::optional<at::Tensor>& factor, at::ScalarType dtype, bool reuse) {
  std::vector<at::Tensor> scaled;
  scaled.reserve(grads.size());
  const bool scalar = upstream.dim() == 0;
  const double value = scalar ? upstream.item<double>() : 0;
  const at::Tensor column = upstream.dim() == 1 ? upstream.unsqueeze(1) : upstream;
  const at::Tensor factors = factor ? factor->to(at::kDouble).contiguous() : at::Tensor();
  for (size_t b = 0; b < grads.size(); ++b) {
    const at::Tensor& g = grads[b];
    const double own = factor ? factors.const_data_ptr<double>()[b] : 1;
    const bool in_place = reuse && g.scalar_type() == dtype;
    if (scalar && value * own == 1 && in_place) {
      scaled.push_back(g);
    } else if (scalar) {
      scaled.push_back(in_place ? g.mul_(value * own) : g.mul(value * own).to(dtype));
    } else {
      scaled.push_back(g.to(upstream.scalar_type()).mul(own == 1 ? column : column * own).to(dtype));
    }
  }
  return scaled;
}

std::vector<at::Tensor> modulate_backward(at::TensorList grads, at::IntArrayRef modalities,
                                          const at::Tensor& link) {
  const at::Tensor values = link.to(at::kDouble).contiguous();
  const double* value = values.const_data_ptr<double>();
  std::vector<at::Tensor> modulated;
  modulated.reserve(grads.size());
  for (size_t i = 0; i < grads.size(); ++i) modulated.push_back(grads[i].mul(1 + value[modalities[i]]));
  return modulated;
}

// ---- the registered ops, whose schemas are in arl_fast/implementations/ops.py ----------------------------

namespace {

// Options from a text in which 0.0 stands for each float: where those go.
struct ParsedText {
  Options options;
  c10::SmallVector<size_t, 4> floats;  // offsets in Options
};

bool parse_field(const OptionField& field, const std::string& word, ParsedText* parsed) {
  char* place = reinterpret_cast<char*>(&parsed->options) + field.offset;
  char* end = nullptr;
  switch (field.kind) {
    case Kind::kChoice:
      for (int i = 0; i < field.choice_count; ++i) {
        if (word != field.choices[i]) continue;
        *reinterpret_cast<int*>(place) = i;
        return true;
      }
      return false;
    case Kind::kNumber:
      if (word == "None") {
        *reinterpret_cast<double*>(place) = field.none;
        return field.optional;
      }
      if (word == "0.0") parsed->floats.push_back(field.offset);
      *reinterpret_cast<double*>(place) = std::strtod(word.c_str(), &end);
      return *end == '\0';
    case Kind::kInteger:
      *reinterpret_cast<int64_t*>(place) = std::strtoll(word.c_str(), &end, 10);
      return *end == '\0';
  }
  return false;
}

// The text is that of a Python tuple in the order of kOptionFields.
const ParsedText& parse(std::string_view text) {
  static std::mutex mutex;
  static auto* known = new std::map<std::string, ParsedText, std::less<>>;  // a handful in any run
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known->find(text);
  if (found != known->end()) return found->second;
  std::string bare(text);
  const auto separates = [](char c) { return c == '(' || c == ')' || c == ',' || c == '\''; };
  std::replace_if(bare.begin(), bare.end(), separates, ' ');
  std::istringstream words(bare);
  std::string word;
  ParsedText parsed;
  for (const OptionField& field : kOptionFields) {
    TORCH_CHECK_VALUE(words >> word && parse_field(field, word, &parsed), field.name, ": got '", word,
                      "' in ", text, ", which these kernels do not know");
  }
  return known->emplace(text, parsed).first->second;
}

Options options_from(std::string_view text, at::ArrayRef<double> floats) {
  const ParsedText& parsed = parse(text);
  TORCH_CHECK_VALUE(floats.size() == parsed.floats.size(), "options: got ", floats.size(), " floats for ",
                    text);
  Options options = parsed.options;
  for (size_t i = 0; i < floats.size(); ++i) {
    *reinterpret_cast<double*>(reinterpret_cast<char*>(&options) + parsed.floats[i]) = floats[i];
  }
  return options;
}

using OptionalTensors = c10::List<std::optional<at::Tensor>>;

const at::Tensor* given(const std::optional<at::Tensor>& tensor) { return tensor ? &*tensor : nullptr; }

// `schedule` is gamma, temperature and step where they are tensors; `numbers` the gammas and the temperature.
Results forward_op(at::TensorList logits, const at::Tensor& target, const std::optional<at::Tensor>& mask,
                   const std::optional<at::Tensor>& weight, const std::optional<at::Tensor>& divisor,
                   const std::optional<at::Tensor>& pos_weight, const OptionalTensors& schedule,
                   at::ArrayRef<double> numbers, int64_t warmup, std::string_view options,
                   at::ArrayRef<double> floats, bool grad) {
  TORCH_CHECK_VALUE(schedule.size() == 3 && !numbers.empty(),
                    "schedule: expected 3 tensors or None, and numbers");
  const std::optional<at::Tensor> gamma = schedule.get(0), temperature = schedule.get(1),
                                  step = schedule.get(2);
  Schedule given_schedule{given(gamma), given(temperature), given(step)};
  given_schedule.gammas.assign(numbers.begin(), numbers.end() - 1);
  given_schedule.temperature_number = numbers.back();
  given_schedule.warmup = warmup;
  const Targets targets{&target, given(mask), given(weight), given(divisor), given(pos_weight)};
  return forward(logits, targets, given_schedule, options_from(options, floats), grad);
}

std::vector<at::Tensor> modulate_op(at::TensorList grads, at::IntArrayRef modalities,
                                    const at::Tensor& link) {
  std::vector<at::Tensor> modulated = modulate_backward(grads, modalities, link);
  for (at::Tensor& g : modulated) g = g.contiguous();  // as the fake says
  return modulated;
}

std::vector<at::Tensor> scale_op(at::TensorList grads, const at::Tensor& upstream,
                                 const std::optional<at::Tensor>& factor, at::ScalarType dtype) {
  return scale(grads, upstream, factor, dtype, false);
}

}  // namespace

TORCH_LIBRARY_IMPL(arl_fast, CPU, library) {
  library.impl("native_forward", &forward_op);
  library.impl("native_scale", &scale_op);
  library.impl("native_modulate_backward", &modulate_op);
}

}  // namespace arl
