// libnvidia-ml.so.1: one card, the one that runtime.cpp emulates; as much of NVML as torch and this project ask.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#define API extern "C" __attribute__((visibility("default")))
typedef unsigned long long u64;
typedef int R;  // nvmlReturn_t: 0 success, 2 invalid argument, 3 not supported, 9 driver not loaded
extern "C" void emu_card(const char **, int *, int *, int *, size_t *);
extern "C" size_t emu_used_bytes();
extern "C" size_t emu_others_bytes();
namespace {
struct About {
  const char *name;
  int major, minor, sms;
  size_t total;
};
About about() {
  About a;
  emu_card(&a.name, &a.major, &a.minor, &a.sms, &a.total);
  return a;
}
// What other programs hold: one process of that size is named.
u64 others() { return emu_others_bytes(); }
u64 reserved() {
  const char *v = getenv("EMU_RESERVED_MIB");
  return (u64)((v ? atof(v) : 378) * (1 << 20));
}
struct Memory { u64 total, free, used; };
struct Memory2 { unsigned version; u64 total, reserved, free, used; };
struct Process1 { unsigned pid; u64 used; };  // of the function without a version, which torch asks
struct Process { unsigned pid; u64 used; unsigned gi, ci; };
}
API R nvmlInit_v2() { return getenv("EMU_NO_CARD") ? 9 : 0; }
API R nvmlInitWithFlags(unsigned) { return nvmlInit_v2(); }
API R nvmlShutdown() { return 0; }
API const char *nvmlErrorString(R r) { return r == 0 ? "Success" : r == 9 ? "Driver Not Loaded" : "Emulated error"; }
API R nvmlDeviceGetCount_v2(unsigned *n) { return *n = 1, 0; }
API R nvmlDeviceGetHandleByIndex_v2(unsigned i, void **h) { return i ? 2 : (*h = (void *)0x10, 0); }
API R nvmlDeviceGetHandleByPciBusId_v2(const char *, void **h) { return *h = (void *)0x10, 0; }
API R nvmlDeviceGetName(void *, char *text, unsigned n) { return snprintf(text, n, "%s", about().name), 0; }
API R nvmlDeviceGetUUID(void *, char *text, unsigned n) { return snprintf(text, n, "GPU-01020304-0506-0708-090a-0b0c0d0e0f10"), 0; }
API R nvmlDeviceGetCudaComputeCapability(void *, int *a, int *b) { return *a = about().major, *b = about().minor, 0; }
API R nvmlDeviceGetMemoryInfo(void *, Memory *m) {
  m->total = about().total + reserved(), m->used = emu_used_bytes() + others() + reserved(), m->free = m->total - m->used;
  return 0;
}
API R nvmlDeviceGetMemoryInfo_v2(void *, Memory2 *m) {
  m->total = about().total + reserved(), m->reserved = reserved(), m->used = emu_used_bytes() + others();
  m->free = m->total - m->reserved - m->used;
  return 0;
}
template <class P>
static R processes(unsigned *n, P *p) {
  unsigned wanted = 1 + (others() > 0), given = *n;
  *n = wanted;
  if (given < wanted) return 7;  // insufficient size
  P own = {(unsigned)getpid(), emu_used_bytes()}, other = {1, others()};
  p[0] = own;
  if (wanted > 1) p[1] = other;
  return 0;
}
API R nvmlDeviceGetComputeRunningProcesses_v3(void *, unsigned *n, Process *p) { return processes(n, p); }
API R nvmlDeviceGetComputeRunningProcesses(void *, unsigned *n, Process1 *p) { return processes(n, p); }
API R nvmlDeviceGetGraphicsRunningProcesses_v3(void *, unsigned *n, Process *) { return *n = 0, 0; }
API R nvmlSystemGetProcessName(unsigned, char *text, unsigned n) { return snprintf(text, n, "/usr/bin/desktop"), 0; }
API R nvmlSystemGetDriverVersion(char *text, unsigned n) { return snprintf(text, n, "580.65.06"), 0; }
API R nvmlSystemGetNVMLVersion(char *text, unsigned n) { return snprintf(text, n, "13.580.65"), 0; }
API R nvmlSystemGetCudaDriverVersion_v2(int *v) { return *v = 13000, 0; }
API R nvmlSystemGetCudaDriverVersion(int *v) { return *v = 13000, 0; }
API R nvmlDeviceGetMemoryBusWidth(void *, unsigned *v) { return *v = 192, 0; }
API R nvmlDeviceGetNumGpuCores(void *, unsigned *v) { return *v = 128 * about().sms, 0; }
API R nvmlDeviceGetMaxClockInfo(void *, int kind, unsigned *v) { return *v = kind == 2 ? 7501 : 2100, 0; }
API R nvmlDeviceGetNvLinkRemoteDeviceType(void *, unsigned, int *) { return 3; }
API R nvmlDeviceGetNvLinkRemotePciInfo_v2(void *, unsigned, void *) { return 3; }
API R nvmlDeviceGetGpuFabricInfoV(void *, void *) { return 3; }
