// A reader of JSON (RFC 8259), enough for manifests and the headers of safetensors files.
#pragma once

#include <charconv>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace zsmerge {

class Json {
 public:
  using Array = std::vector<Json>;
  using Object = std::vector<std::pair<std::string, Json>>;

  // The value that is the whole text. Throws std::runtime_error.
  static Json parse(std::string_view text) {
    Reader reader{text};
    Json value = reader.value(0);
    reader.space();
    if (reader.at != text.size()) reader.fail("the end");
    return value;
  }

  bool null() const { return std::holds_alternative<std::nullptr_t>(value_); }
  const std::string& text() const { return get<std::string>("a string"); }
  int64_t integer() const { return get<int64_t>("an integer"); }
  const Array& array() const { return get<Array>("an array"); }
  const Object& object() const { return get<Object>("an object"); }

  // The member of this name. Throws std::runtime_error where there is none.
  const Json& operator[](std::string_view name) const {
    for (const auto& [key, member] : object())
      if (key == name) return member;
    throw std::runtime_error("JSON object must have \"" + std::string(name) + "\", got none");
  }

 private:
  std::variant<std::nullptr_t, bool, int64_t, double, std::string, Array, Object> value_;

  template <typename T>
  const T& get(const char* expected) const {
    if (const T* found = std::get_if<T>(&value_)) return *found;
    throw std::runtime_error("JSON value must be " + std::string(expected) + ", got another kind");
  }

  struct Reader {
    static constexpr int kDeepest = 64;

    std::string_view text;
    size_t at = 0;

    [[noreturn]] void fail(const std::string& expected) const {
      throw std::runtime_error("JSON must have " + expected + " at byte " + std::to_string(at) + ", got something else");
    }

    void space() {
      while (at < text.size() && std::string_view(" \t\r\n").find(text[at]) != std::string_view::npos) ++at;
    }

    bool take(char sign) {
      space();
      if (at == text.size() || text[at] != sign) return false;
      ++at;
      return true;
    }

    void need(char sign) {
      if (!take(sign)) fail(std::string("'") + sign + "'");
    }

    bool word(std::string_view name) {
      if (text.substr(at, name.size()) != name) return false;
      at += name.size();
      return true;
    }

    Json value(int depth) {
      if (depth > kDeepest) fail("at most 64 levels");
      Json made;
      space();
      if (take('{')) {
        made.value_ = members(depth);
      } else if (take('[')) {
        Array items;
        if (!take(']')) {
          do items.push_back(value(depth + 1));
          while (take(','));
          need(']');
        }
        made.value_ = std::move(items);
      } else if (take('"')) {
        made.value_ = string();
      } else if (word("true")) {
        made.value_ = true;
      } else if (word("false")) {
        made.value_ = false;
      } else if (word("null")) {
        made.value_ = nullptr;
      } else {
        number(made);
      }
      return made;
    }

    Object members(int depth) {
      Object found;
      if (take('}')) return found;
      do {
        need('"');
        std::string name = string();
        need(':');
        found.emplace_back(std::move(name), value(depth + 1));
      } while (take(','));
      need('}');
      return found;
    }

    void number(Json& made) {
      const size_t end = std::min(text.find_first_not_of("+-0123456789.eE", at), text.size());
      const char *first = text.data() + at, *last = text.data() + end;
      int64_t whole = 0;
      double real = 0;
      if (auto [stop, error] = std::from_chars(first, last, whole); error == std::errc() && stop == last) {
        made.value_ = whole;
      } else if (auto [stop, error] = std::from_chars(first, last, real); error == std::errc() && stop == last) {
        made.value_ = real;
      } else {
        fail("a value");
      }
      at = end;
    }

    // After the opening quote, to behind the closing one.
    std::string string() {
      std::string made;
      while (at < text.size() && text[at] != '"') {
        if (text[at] != '\\') {
          made += text[at++];
          continue;
        }
        if (++at == text.size()) break;
        const char sign = text[at++];
        constexpr std::string_view names = "\"\\/bfnrt", signs = "\"\\/\b\f\n\r\t";
        if (const size_t found = names.find(sign); found != std::string_view::npos)
          made += signs[found];
        else if (sign == 'u')
          utf8(made, code_point());
        else
          fail("an escape");
      }
      if (at == text.size()) fail("'\"'");
      ++at;
      return made;
    }

    uint32_t code_point() {
      const uint32_t first = hex();
      if (first < 0xD800 || first > 0xDBFF) return first;
      if (!word("\\u")) fail("the second half of a surrogate pair");
      const uint32_t second = hex();
      if (second < 0xDC00 || second > 0xDFFF) fail("the second half of a surrogate pair");
      return 0x10000 + ((first - 0xD800) << 10) + (second - 0xDC00);
    }

    uint32_t hex() {
      uint32_t read = 0;
      if (at + 4 > text.size()) fail("four hexadecimal digits");
      const auto [stop, error] = std::from_chars(text.data() + at, text.data() + at + 4, read, 16);
      if (error != std::errc() || stop != text.data() + at + 4) fail("four hexadecimal digits");
      at += 4;
      return read;
    }

    static void utf8(std::string& out, uint32_t code) {
      const auto more = [&](int shift) { out += static_cast<char>(0x80 | ((code >> shift) & 0x3F)); };
      if (code < 0x80) {
        out += static_cast<char>(code);
      } else if (code < 0x800) {
        out += static_cast<char>(0xC0 | (code >> 6));
        more(0);
      } else if (code < 0x10000) {
        out += static_cast<char>(0xE0 | (code >> 12));
        more(6), more(0);
      } else {
        out += static_cast<char>(0xF0 | (code >> 18));
        more(12), more(6), more(0);
      }
    }
  };
};

}  // namespace zsmerge
