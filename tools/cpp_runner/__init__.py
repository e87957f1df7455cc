"""The C++ runner of aoti bundles and what builds it."""
