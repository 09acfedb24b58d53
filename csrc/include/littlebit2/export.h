/* Symbol visibility of the C ABI. */
#ifndef LITTLEBIT2_EXPORT_H_
#define LITTLEBIT2_EXPORT_H_

#define LB2_API __attribute__((visibility("default")))

#endif /* LITTLEBIT2_EXPORT_H_ */
