// Code that both programs share: the description of a bundle, and the token ids from standard input.

#pragma once

#include <cstdint>
#include <fstream>
#include <iostream>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "json.h"

struct Tensor {
  std::string name, dtype;
  json::Value shape;  // numbers, or names of dynamic axes
  int64_t limit = 0;  // exclusive upper bound of an integer input; 0 if there is none

  // Returns the shape for (batch, tokens). Only token inputs and logits are used here, so other axes are unknown.
  std::vector<int64_t> sized(int64_t batch, int64_t tokens) const {
    std::vector<int64_t> sizes;
    for (const json::Value& axis : shape.array()) {
      if (!axis.is_string())
        sizes.push_back(static_cast<int64_t>(axis.number()));
      else if (axis.string() == "batch")
        sizes.push_back(batch);
      else if (axis.string() == "sequence" || axis.string() == "total")
        sizes.push_back(tokens);
      else
        throw std::runtime_error(name + " has the axis " + axis.string() + ", which this example does not support");
    }
    return sizes;
  }
};

struct Bundle {
  std::string folder;
  json::Value manifest;
  std::vector<Tensor> inputs, outputs;

  explicit Bundle(const std::string& where) : folder(where) {
    manifest = json::Value::parse(read(where + "/bundle.json"));
    if (manifest["format_version"].number() != 2)
      throw std::runtime_error("bundle.json has another format version than 2");
    if (manifest["task"].string() != "classification")
      throw std::runtime_error("this example runs classifiers; the bundle contains a " + manifest["task"].string() +
                               " model");
    if (!manifest["adapter"].is_null())
      throw std::runtime_error("the bundle has adapters as inputs; compile it with --lora merge for this example");
    inputs = tensors(manifest["inputs"]);
    outputs = tensors(manifest["outputs"]);
  }

  static std::string read(const std::string& path) {
    std::ifstream file(path, std::ios::binary);
    if (!file) throw std::runtime_error("cannot read " + path);
    std::ostringstream content;
    content << file.rdbuf();
    return content.str();
  }

  // Returns the values of one token input for one sequence: the ids, a mask of ones, or zeros.
  static std::vector<int64_t> values(const Tensor& input, const std::vector<int64_t>& ids) {
    if (input.name == "input_ids") return ids;
    return std::vector<int64_t>(ids.size(), input.name == "attention_mask" ? 1 : 0);
  }

 private:
  static std::vector<Tensor> tensors(const json::Value& described) {
    std::vector<Tensor> result;
    for (const json::Value& each : described.array()) {
      const json::Value& limit = each["limit"];
      const int64_t bound = limit.is_null() ? 0 : static_cast<int64_t>(limit.number());
      result.push_back({each["name"].string(), each["dtype"].string(), each["shape"], bound});
    }
    return result;
  }
};

inline int64_t elements(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<int64_t>());
}

// Calls `run(ids)`, which returns logits, for every line of token ids on standard input, and prints the logits.
template <typename Run>
void for_each_line(const Bundle& bundle, Run run) {
  const auto max_tokens = static_cast<size_t>(bundle.manifest["max_tokens"].number());
  int64_t vocabulary = 0;
  for (const Tensor& input : bundle.inputs)
    if (input.name == "input_ids") vocabulary = input.limit;
  std::string line;
  for (int number = 1; std::getline(std::cin, line); ++number) {
    std::istringstream words(line);
    std::vector<int64_t> ids;
    for (int64_t id; words >> id;) ids.push_back(id);
    const std::string place = "line " + std::to_string(number) + ": ";
    if (!words.eof() || ids.empty() || ids.size() > max_tokens)
      throw std::runtime_error(place + "expected 1 to " + std::to_string(max_tokens) + " token ids");
    for (int64_t id : ids)  // a negative id would silently select a row from the end of the embedding
      if (id < 0 || (vocabulary > 0 && id >= vocabulary))
        throw std::runtime_error(place + "the token id " + std::to_string(id) + " is not within 0.." +
                                 std::to_string(vocabulary - 1));
    const std::vector<float> logits = run(ids);
    for (size_t index = 0; index < logits.size(); ++index) std::cout << (index ? " " : "") << logits[index];
    std::cout << std::endl;
  }
}
