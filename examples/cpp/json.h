// A minimal JSON parser for bundle.json in one header, so that the examples have no further dependencies. Numbers are
// doubles, which represent every integer in a bundle exactly. Errors are std::runtime_error with the position.

#pragma once

#include <cctype>
#include <cstdlib>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace json {

class Value {
 public:
  enum class Kind { null, boolean, number, string, array, object };

  static Value parse(const std::string& text) {
    Reader reader{text};
    Value value = reader.value(0);
    reader.space();
    if (reader.at != text.size()) reader.fail("something follows the end");
    return value;
  }

  bool is_null() const { return kind_ == Kind::null; }
  double number() const { return expect(Kind::number, "a number").number_; }
  const std::string& string() const { return expect(Kind::string, "a string").string_; }
  const std::vector<Value>& array() const { return expect(Kind::array, "an array").array_; }
  bool is_string() const { return kind_ == Kind::string; }

  // Returns a member of an object; throws if it is missing.
  const Value& operator[](const std::string& key) const {
    const auto& members = expect(Kind::object, "an object").members_;
    auto found = members.find(key);
    if (found == members.end()) throw std::runtime_error("bundle.json has no \"" + key + "\"");
    return found->second;
  }

 private:
  const Value& expect(Kind kind, const char* what) const {
    if (kind_ != kind)
      throw std::runtime_error(std::string("bundle.json holds something else where ") + what + " belongs");
    return *this;
  }

  struct Reader {
    const std::string& text;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& why) const {
      throw std::runtime_error("JSON, byte " + std::to_string(at) + ": " + why);
    }

    void space() {
      while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
    }

    char next() {
      space();
      if (at >= text.size()) fail("it ends too early");
      return text[at];
    }

    void take(const std::string& word) {
      if (text.compare(at, word.size(), word) != 0) fail("expected " + word);
      at += word.size();
    }

    Value value(int depth) {
      if (depth > 64) fail("nested too deeply");
      Value result;
      switch (next()) {
        case '{':
          object(result, depth);
          break;
        case '[':
          array(result, depth);
          break;
        case '"':
          result.kind_ = Kind::string;
          result.string_ = string();
          break;
        case 't':
          take("true");
          result.kind_ = Kind::boolean;
          break;
        case 'f':
          take("false");
          result.kind_ = Kind::boolean;
          break;
        case 'n':
          take("null");
          break;
        default: {
          char* end = nullptr;
          result.kind_ = Kind::number;
          result.number_ = std::strtod(text.c_str() + at, &end);
          if (end == text.c_str() + at) fail("expected a value");
          at = static_cast<size_t>(end - text.c_str());
        }
      }
      return result;
    }

    void object(Value& result, int depth) {
      result.kind_ = Kind::object;
      take("{");
      if (next() == '}') return take("}");
      while (true) {
        if (next() != '"') fail("expected a key");
        std::string key = string();
        next();
        take(":");
        result.members_[key] = value(depth + 1);
        if (next() == '}') return take("}");
        take(",");
      }
    }

    void array(Value& result, int depth) {
      result.kind_ = Kind::array;
      take("[");
      if (next() == ']') return take("]");
      while (true) {
        result.array_.push_back(value(depth + 1));
        if (next() == ']') return take("]");
        take(",");
      }
    }

    // Escapes that do not occur in names and paths are kept unchanged.
    std::string string() {
      std::string result;
      for (take("\""); at < text.size() && text[at] != '"'; ++at) {
        if (text[at] == '\\' && at + 1 < text.size()) {
          char escaped = text[++at];
          if (escaped != '"' && escaped != '\\' && escaped != '/') result += '\\';
          result += escaped;
        } else {
          result += text[at];
        }
      }
      take("\"");
      return result;
    }
  };

  Kind kind_ = Kind::null;
  double number_ = 0;
  std::string string_;
  std::vector<Value> array_;
  std::map<std::string, Value> members_;
};

}  // namespace json
