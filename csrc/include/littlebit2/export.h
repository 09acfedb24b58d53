/* Symbol visibility of the C ABI. */
#ifndef LITTLEBIT2_EXPORT_H_
#define LITTLEBIT2_EXPORT_H_

#if defined(LB2_STATIC)
#define LB2_API
#else
#define LB2_API __attribute__((visibility("default")))
#endif

#endif /* LITTLEBIT2_EXPORT_H_ */
