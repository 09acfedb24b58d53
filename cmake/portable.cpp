// For wheels: what the operator libraries use of a newer libstdc++ and glibc, so that they load with those of
// glibc 2.28 too. Linked into them with LB2_PORTABLE=ON; portable.map keeps it to themselves. A C++ library
// of their own (as of zig's compiler) would not do: torch catches the errors that they throw, for which both
// must have the same kind of runtime.
#include <new>
#include <sstream>

// Members that GCC 9 and 11 added to the library.
template class std::basic_stringbuf<char>;
template class std::basic_ostringstream<char>;
template class std::basic_stringstream<char>;

extern "C" {

// 1 lets libstdc++ count references without atomic operations. 0 is always right.
char __libc_single_threaded = 0;

// std::__throw_bad_array_new_length, which GCC 12's headers call.
[[noreturn]] void lb2_throw_bad_array_new_length() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void lb2_throw_bad_array_new_length() { throw std::bad_array_new_length(); }
}
