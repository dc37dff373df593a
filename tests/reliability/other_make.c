// Preloaded into a process, makes CPUID name AMD as the maker of an Intel processor and a Zen 4 as the model, so
// that libraries that go by it (MKL) take the paths that they take there. Linux on x86-64 with CPUID faulting.
#define _GNU_SOURCE
#include <asm/prctl.h>
#include <dlfcn.h>
#include <signal.h>
#include <string.h>
#include <sys/syscall.h>
#include <ucontext.h>
#include <unistd.h>

typedef int (*Sigaction)(int, const struct sigaction *, struct sigaction *);

static struct sigaction others;  // what the program wants done on a real violation
static int ready;

static int real_sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  static Sigaction real;
  if (real == NULL) real = (Sigaction)dlsym(RTLD_NEXT, "sigaction");
  return real(number, action, before);
}

// Python's faulthandler would take the place of ours.
int sigaction(int number, const struct sigaction *action, struct sigaction *before) {
  if (number != SIGSEGV || !ready) return real_sigaction(number, action, before);
  if (before != NULL) *before = others;
  if (action != NULL) others = *action;
  return 0;
}

static void answer(int number, siginfo_t *info, void *context) {
  (void)number;
  greg_t *const registers = ((ucontext_t *)context)->uc_mcontext.gregs;
  const unsigned char *const at = (const unsigned char *)registers[REG_RIP];
  if (info->si_code == SEGV_MAPERR || info->si_code == SEGV_ACCERR || at[0] != 0x0F || at[1] != 0xA2) {
    real_sigaction(SIGSEGV, &others, NULL);  // the instruction runs into it again
    return;
  }
  const unsigned leaf = (unsigned)registers[REG_RAX];
  unsigned a = leaf, b, c = (unsigned)registers[REG_RCX], d;
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 1);
  __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
  syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0);
  if (leaf == 0 || leaf == 0x80000000U) {
    memcpy(&b, "Auth", 4);
    memcpy(&d, "enti", 4);
    memcpy(&c, "cAMD", 4);
  }
  if (leaf == 1) a = 0x00A10F11;
  if (leaf == 4) a = b = c = d = 0;  // Intel's own way to describe caches
  registers[REG_RAX] = a;
  registers[REG_RBX] = b;
  registers[REG_RCX] = c;
  registers[REG_RDX] = d;
  registers[REG_RIP] += 2;
}

__attribute__((constructor)) static void start(void) {
  struct sigaction action;
  memset(&action, 0, sizeof action);
  action.sa_sigaction = answer;
  action.sa_flags = SA_SIGINFO | SA_NODEFER | SA_ONSTACK;
  real_sigaction(SIGSEGV, &action, &others);
  ready = 1;
  if (syscall(SYS_arch_prctl, ARCH_SET_CPUID, 0) != 0) {
    static const char message[] = "this processor or kernel has no CPUID faulting\n";
    _exit(write(2, message, sizeof message - 1) < 0 ? 1 : 77);
  }
}
