// For wheels: the static CUDA runtime and our own dlopen, linked where glibc is 2.34 or newer, would ask for
// what that one moved from libpthread, libdl and librt into libc. Each of these functions jumps to the
// version that every x86-64 glibc has, so that the libraries load with glibc 2.28 too. Linked with
// LB2_PORTABLE=ON, with the libraries that hold them there; hidden, so that nobody else finds them.
#if !defined(__x86_64__)
#error \
    "the CUDA kernels of a portable build are for x86-64: versions of glibc's functions differ on other processors"
#endif

#define LB2_OLD(name, version)                                                     \
  __asm__(".symver lb2_old_" #name "," #name "@GLIBC_" version                     \
          "\n"                                                                     \
          ".pushsection .text\n"                                                   \
          ".globl " #name "\n.hidden " #name "\n.type " #name ",@function\n" #name \
          ": endbr64\n  jmp *lb2_old_" #name                                       \
          "@GOTPCREL(%rip)\n"                                                      \
          ".size " #name ",.-" #name "\n.popsection\n")

LB2_OLD(dlclose, "2.2.5");
LB2_OLD(dlerror, "2.2.5");
LB2_OLD(dlmopen, "2.3.4");
LB2_OLD(dlopen, "2.2.5");
LB2_OLD(dlsym, "2.2.5");
LB2_OLD(dlvsym, "2.2.5");
LB2_OLD(pthread_condattr_setpshared, "2.2.5");
LB2_OLD(pthread_create, "2.2.5");
LB2_OLD(pthread_detach, "2.2.5");
LB2_OLD(pthread_getspecific, "2.2.5");
LB2_OLD(pthread_join, "2.2.5");
LB2_OLD(pthread_key_create, "2.2.5");
LB2_OLD(pthread_key_delete, "2.2.5");
LB2_OLD(pthread_kill, "2.2.5");
LB2_OLD(pthread_mutex_trylock, "2.2.5");
LB2_OLD(pthread_mutexattr_destroy, "2.2.5");
LB2_OLD(pthread_mutexattr_init, "2.2.5");
LB2_OLD(pthread_mutexattr_setpshared, "2.2.5");
LB2_OLD(pthread_mutexattr_settype, "2.2.5");
LB2_OLD(pthread_once, "2.2.5");
LB2_OLD(pthread_rwlock_destroy, "2.2.5");
LB2_OLD(pthread_rwlock_init, "2.2.5");
LB2_OLD(pthread_rwlock_rdlock, "2.2.5");
LB2_OLD(pthread_rwlock_timedrdlock, "2.2.5");
LB2_OLD(pthread_rwlock_timedwrlock, "2.2.5");
LB2_OLD(pthread_rwlock_tryrdlock, "2.2.5");
LB2_OLD(pthread_rwlock_trywrlock, "2.2.5");
LB2_OLD(pthread_rwlock_unlock, "2.2.5");
LB2_OLD(pthread_rwlock_wrlock, "2.2.5");
LB2_OLD(pthread_rwlockattr_destroy, "2.2.5");
LB2_OLD(pthread_rwlockattr_init, "2.2.5");
LB2_OLD(pthread_rwlockattr_setpshared, "2.2.5");
LB2_OLD(pthread_setspecific, "2.2.5");
LB2_OLD(pthread_spin_destroy, "2.2.5");
LB2_OLD(pthread_spin_init, "2.2.5");
LB2_OLD(pthread_spin_lock, "2.2.5");
LB2_OLD(pthread_spin_trylock, "2.2.5");
LB2_OLD(pthread_spin_unlock, "2.2.5");
LB2_OLD(sem_destroy, "2.2.5");
LB2_OLD(sem_init, "2.2.5");
LB2_OLD(sem_post, "2.2.5");
LB2_OLD(sem_timedwait, "2.2.5");
LB2_OLD(sem_trywait, "2.2.5");
LB2_OLD(sem_wait, "2.2.5");
LB2_OLD(shm_open, "2.2.5");
LB2_OLD(shm_unlink, "2.2.5");
