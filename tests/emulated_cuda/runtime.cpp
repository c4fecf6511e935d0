// An emulated CUDA runtime and driver: it hands out addresses, counts bytes and computes nothing.
//
// Stands in for libcudart.so.13 and for libcuda.so.1 under PyTorch's CUDA build. Device memory is host address space that is
// mapped without being touched; what a card refuses is refused here. Kernel launches are counted by name and dropped. What is
// not defined here is a generated stub that returns success and is counted by name (build.py).
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <atomic>
#include <map>
#include <mutex>
#include <string>
#include <unordered_map>
#include <vector>

#define API extern "C" __attribute__((visibility("default")))

namespace {

constexpr size_t KIB = 1024, MIB = 1024 * KIB, GIB = 1024 * MIB, TIB = 1024 * GIB;

// ---------------------------------------------------------------------------------------------- the card

struct Preset {
  const char *key, *name;
  int major, minor, sms;
  size_t total_mib;  // what CUDA programs can use
};
const Preset PRESETS[] = {
    {"gtx1660", "NVIDIA GeForce GTX 1660", 7, 5, 22, 5735},
    {"rtx2060", "NVIDIA GeForce RTX 2060", 7, 5, 30, 5735},
    {"rtx3060", "NVIDIA GeForce RTX 3060", 8, 6, 28, 11910},
    {"rtx3090", "NVIDIA GeForce RTX 3090", 8, 6, 82, 24123},
    {"rtx4070l", "NVIDIA GeForce RTX 4070 Laptop GPU", 8, 9, 36, 7806},
    {"rtx4090", "NVIDIA GeForce RTX 4090", 8, 9, 128, 24081},
    {"rtx5070", "NVIDIA GeForce RTX 5070", 12, 0, 48, 11755},
    {"a100", "NVIDIA A100-SXM4-80GB", 8, 0, 108, 81000},
    {"h100", "NVIDIA H100 80GB HBM3", 9, 0, 132, 81000},
};

struct Card {
  std::string name = "NVIDIA GeForce RTX 3060";
  int major = 8, minor = 6, sms = 28;
  size_t total = 11910 * MIB, context = 0, copy_max = 256 * KIB;
  size_t others = 0;  // what other programs hold of it
  bool present = true;

  Card() {
    const char *key = getenv("EMU_CARD");
    if (key)
      for (const Preset &p : PRESETS)
        if (!strcmp(p.key, key)) name = p.name, major = p.major, minor = p.minor, sms = p.sms, total = p.total_mib * MIB;
    if (const char *v = getenv("EMU_NAME")) name = v;
    if (const char *v = getenv("EMU_CC")) sscanf(v, "%d.%d", &major, &minor);
    if (const char *v = getenv("EMU_SMS")) sms = atoi(v);
    if (const char *v = getenv("EMU_MIB")) total = (size_t)(atof(v) * MIB);
    context = (size_t)((32 + 2.92 * sms) * MIB);
    if (const char *v = getenv("EMU_CONTEXT_MIB")) context = (size_t)(atof(v) * MIB);
    if (const char *v = getenv("EMU_OTHERS_MIB")) others = (size_t)(atof(v) * MIB);
    if (const char *v = getenv("EMU_COPY_MAX_KIB")) copy_max = (size_t)(atof(v) * KIB);
    const char *visible = getenv("CUDA_VISIBLE_DEVICES");
    present = !getenv("EMU_NO_CARD") && !(visible && (!*visible || *visible == '-'));
  }
  int optin() const {
    if (major == 7) return 64 * KIB;
    if (major == 8 && minor == 0) return 163 * KIB;
    if (major == 9 || major == 10) return 227 * KIB;
    return 99 * KIB;
  }
  int shared_per_sm() const { return major == 7 ? 64 * KIB : optin() + KIB; }
  int threads_per_sm() const { return major == 7 ? 1024 : (major == 8 && minor == 0) || major == 9 || major == 10 ? 2048 : 1536; }
  int blocks_per_sm() const { return major == 7 || (major == 8 && minor >= 6) ? (major == 8 && minor == 9 ? 24 : 16) : 32; }
};
Card &card() {
  static Card *c = new Card;
  return *c;
}

// ---------------------------------------------------------------------------------------------- addresses

// One range of addresses for each kind of memory, so that a pointer tells what it is.
struct Region {
  char *base = nullptr;
  size_t size = 0, next = 0;
  std::map<size_t, size_t> holes;       // offset -> size
  std::map<size_t, size_t> taken;       // offset -> size
  std::map<size_t, size_t> asked;       // offset -> bytes asked for
  void init(size_t bytes) {
    size = bytes;
    base = (char *)mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) abort();
    madvise(base, size, MADV_NOHUGEPAGE);
    next = (-(size_t)base) & (2 * MIB - 1);  // whole pages of 2 MiB
  }
  bool holds(const void *p) const { return base && (char *)p >= base && (char *)p < base + size; }
  void *take(size_t bytes, size_t align) {
    for (auto it = holes.begin(); it != holes.end(); ++it)
      if (it->second >= bytes) {
        size_t offset = it->first, rest = it->second - bytes;
        holes.erase(it);
        if (rest) holes[offset + bytes] = rest;
        taken[offset] = bytes;
        return base + offset;
      }
    size_t offset = (next + align - 1) / align * align;
    if (offset + bytes > size) return nullptr;
    next = offset + bytes;
    taken[offset] = bytes;
    return base + offset;
  }
  size_t give_back(void *p) {
    auto it = taken.find((size_t)((char *)p - base));
    if (it == taken.end()) return 0;
    size_t offset = it->first, bytes = it->second;
    taken.erase(it);
    madvise(base + offset, bytes, MADV_DONTNEED);
    auto after = holes.lower_bound(offset);
    size_t whole = bytes;
    if (after != holes.end() && after->first == offset + bytes) whole += after->second, after = holes.erase(after);
    if (after != holes.begin()) {
      auto before = std::prev(after);
      if (before->first + before->second == offset) {
        before->second += whole;
        return bytes;
      }
    }
    holes[offset] = whole;
    return bytes;
  }
};
struct State {
  std::mutex lock;
  Region device, host, managed;
  std::map<char *, size_t> registered;
  std::map<unsigned long long, size_t> handles;
  unsigned long long next_handle = 1;
  size_t used = 0, peak = 0, managed_bytes = 0, host_bytes = 0, host_peak = 0;
  bool context = false;
  State() {
    device.init(4 * TIB);
    host.init(2 * TIB);
    managed.init(1 * TIB);
  }
};
State &state() {
  static State *s = new State;
  return *s;
}
size_t occupied(State &s) { return s.used + (s.context ? card().context : 0); }
size_t left(State &s) {
  size_t taken = occupied(s) + card().others;
  return taken > card().total ? 0 : card().total - taken;
}
void touch_context() {
  State &s = state();
  s.context = true;
}
bool reserve(State &s, size_t bytes) {
  s.context = true;
  if (bytes > left(s)) return false;
  s.used += bytes;
  if (s.used > s.peak) s.peak = s.used;
  return true;
}

// ---------------------------------------------------------------------------------------------- the census

struct Function {
  std::string name;
  std::atomic<long> launches{0};
  bool counts_nonzero = false;
};
struct Census {
  std::mutex lock;
  std::unordered_map<const void *, Function *> functions;
  std::map<std::string, std::atomic<long> *> calls;
  Function unknown;
  Census() { unknown.name = "(not registered)"; }
  std::atomic<long> &call(const char *name) {
    std::lock_guard<std::mutex> guard(lock);
    auto &slot = calls[name];
    if (!slot) slot = new std::atomic<long>(0);
    return *slot;
  }
};
Census &census() {
  static Census *c = new Census;
  return *c;
}
#define COUNT(name)                                       \
  do {                                                    \
    static std::atomic<long> &slot = census().call(name); \
    slot.fetch_add(1, std::memory_order_relaxed);         \
  } while (0)

thread_local bool pending_nonzero = false;
std::atomic<long> nonzero_count{getenv("EMU_NONZERO") ? atol(getenv("EMU_NONZERO")) : -1};

cudaError_t launched(const void *function) {
  Census &c = census();
  Function *f = &c.unknown;
  {
    std::lock_guard<std::mutex> guard(c.lock);
    auto it = c.functions.find(function);
    if (it != c.functions.end()) f = it->second;
  }
  f->launches.fetch_add(1, std::memory_order_relaxed);
  if (f->counts_nonzero) pending_nonzero = true;
  return cudaSuccess;
}

struct Configuration {
  dim3 grid, block;
  size_t shared;
  void *stream;
};
thread_local std::vector<Configuration> configurations;
thread_local cudaError_t last_error = cudaSuccess;
cudaError_t fail_in(cudaError_t error, const char *where) {
  static bool trace = getenv("EMU_TRACE") != nullptr;
  if (trace) fprintf(stderr, "emucuda: %s answers with error %d\n", where, (int)error);
  return last_error = error;
}
#define fail(error) fail_in(error, __func__)

double seconds() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}
cudaMemcpyKind kind_of(const void *to, const void *from, cudaMemcpyKind kind) {
  if (kind != cudaMemcpyDefault) return kind;
  bool a = state().device.holds(to), b = state().device.holds(from);
  return a ? (b ? cudaMemcpyDeviceToDevice : cudaMemcpyHostToDevice) : (b ? cudaMemcpyDeviceToHost : cudaMemcpyHostToHost);
}
const char *KINDS[] = {"H2H", "H2D", "D2H", "D2D", "?"};
cudaError_t copy(void *to, const void *from, size_t bytes, cudaMemcpyKind kind, bool synchronous) {
  kind = kind_of(to, from, kind);
  char name[64];
  snprintf(name, sizeof name, "memcpy%s %s %s", synchronous ? "" : "Async", KINDS[kind], bytes <= 64 ? "small" : bytes <= MIB ? "medium" : "large");
  census().call(name).fetch_add(1, std::memory_order_relaxed);
  if (kind == cudaMemcpyDeviceToHost && pending_nonzero && (bytes == 4 || bytes == 8)) {
    pending_nonzero = false;
    long count = nonzero_count.load();
    if (count >= 0) {
      if (bytes == 4) *(int *)to = (int)count;
      else *(long *)to = count;
      return cudaSuccess;
    }
  }
  if (bytes <= card().copy_max || kind == cudaMemcpyHostToHost) memmove(to, from, bytes);
  else if (kind == cudaMemcpyDeviceToHost && !state().host.holds(to)) memset(to, 0, bytes);  // the same each time it is read
  return cudaSuccess;
}

}  // namespace

// ---------------------------------------------------------------------------------------------- for card.py

API void emu_count(const char *name) { census().call(name).fetch_add(1, std::memory_order_relaxed); }
API long emu_stub(const char *name) {
  static bool trace = getenv("EMU_TRACE") != nullptr;
  if (trace) fprintf(stderr, "emucuda: stub %s\n", name);
  std::string key = std::string("stub ") + name;
  census().call(key.c_str()).fetch_add(1, std::memory_order_relaxed);
  return 0;
}
API void emu_set_nonzero(long count) { nonzero_count = count; }
API size_t emu_used_bytes() { return occupied(state()); }
API size_t emu_peak_bytes() { return state().peak; }
API size_t emu_managed_bytes() { return state().managed_bytes; }
API size_t emu_pinned_peak_bytes() { return state().host_peak; }
API void emu_set_others_bytes(size_t bytes) { card().others = bytes; }
API size_t emu_others_bytes() { return card().others; }
// Another card, before anything asked CUDA for one (a process forked from one that has only imported).
API int emu_choose(const char *key, size_t total_mib, size_t context_mib) {
  for (const Preset &p : PRESETS)
    if (!strcmp(p.key, key)) {
      Card &c = card();
      c.name = p.name, c.major = p.major, c.minor = p.minor, c.sms = p.sms;
      c.total = (total_mib ? total_mib : p.total_mib) * MIB, c.context = (size_t)((context_mib ? context_mib : 32 + 2.92 * c.sms) * MIB);
      return 0;
    }
  return 1;
}
API void emu_reset_census() {
  Census &c = census();
  std::lock_guard<std::mutex> guard(c.lock);
  for (auto &pair : c.calls) *pair.second = 0;
  for (auto &pair : c.functions) pair.second->launches = 0;
  c.unknown.launches = 0;
}
// Lines "<kind> <count> <name>"; several functions of one name are several lines.
API int emu_write_census(const char *path) {
  Census &c = census();
  FILE *out = fopen(path, "w");
  if (!out) return 1;
  std::lock_guard<std::mutex> guard(c.lock);
  for (auto &pair : c.calls)
    if (long n = pair.second->load()) fprintf(out, "call %ld %s\n", n, pair.first.c_str());
  for (auto &pair : c.functions)
    if (long n = pair.second->launches.load()) fprintf(out, "kernel %ld %s\n", n, pair.second->name.c_str());
  if (long n = c.unknown.launches.load()) fprintf(out, "kernel %ld %s\n", n, c.unknown.name.c_str());
  fclose(out);
  return 0;
}
// What NVML (nvml.cpp) tells of the same card.
API void emu_card(const char **name, int *major, int *minor, int *sms, size_t *total) {
  *name = card().name.c_str(), *major = card().major, *minor = card().minor, *sms = card().sms, *total = card().total;
}

// ---------------------------------------------------------------------------------------------- modules and launches

API void **__cudaRegisterFatBinary(void *) {
  static void *dummy[4];
  return dummy;
}
API void __cudaRegisterFatBinaryEnd(void **) {}
API void __cudaUnregisterFatBinary(void **) {}
API void __cudaRegisterFunction(void **, const char *host, char *, const char *name, int, uint3 *, uint3 *, dim3 *, dim3 *, int *) {
  Census &c = census();
  std::lock_guard<std::mutex> guard(c.lock);
  Function *&slot = c.functions[host];
  if (slot) return;
  slot = new Function;
  slot->name = name;
  slot->counts_nonzero = strstr(name, "NonZeroOp") || strstr(name, "nonzero");
}
API void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
API void __cudaRegisterManagedVar(void **, void **, char *, const char *, int, size_t, int, int) {}
API char __cudaInitModule(void **) { return 1; }
API unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, struct CUstream_st *stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
API cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  if (configurations.empty()) return fail(cudaErrorMissingConfiguration);
  Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *(void **)stream = last.stream;
  return cudaSuccess;
}
API cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = (cudaKernel_t)function;
  return cudaSuccess;
}
API cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) { return launched((const void *)kernel); }
API cudaError_t __cudaLaunchKernel_ptsz(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) { return launched((const void *)kernel); }
API cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) { return launched(function); }
API cudaError_t cudaLaunchCooperativeKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) { return launched(function); }
API cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *function, void **) { return launched(function); }
API cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t function, void *data) {
  COUNT("cudaLaunchHostFunc");
  function(data);
  return cudaSuccess;
}
API cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void *data, unsigned) {
  function(stream, cudaSuccess, data);
  return cudaSuccess;
}
API cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *a, const void *) {
  memset(a, 0, sizeof *a);
  a->maxThreadsPerBlock = 1024, a->numRegs = 64;
  // Of the architectures that the wheels are compiled for, the one this card runs; cub looks for its tuning by it.
  for (int built : {75, 80, 86, 90, 100, 120})
    if (built <= card().major * 10 + card().minor) a->ptxVersion = a->binaryVersion = built;
  a->maxDynamicSharedSizeBytes = 48 * KIB;
  return cudaSuccess;
}
API cudaError_t cudaFuncGetName(const char **name, const void *function) {
  Census &c = census();
  std::lock_guard<std::mutex> guard(c.lock);
  auto it = c.functions.find(function);
  *name = it == c.functions.end() ? "?" : it->second->name.c_str();
  return cudaSuccess;
}
API cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, const void *, int block, size_t, unsigned) {
  int fit = block > 0 ? card().threads_per_sm() / block : 1;
  *n = fit < 1 ? 1 : fit > card().blocks_per_sm() ? card().blocks_per_sm() : fit;
  return cudaSuccess;
}
API cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *n, const void *f, int block, size_t shared) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(n, f, block, shared, 0);
}
API cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
  *p = const_cast<void *>(symbol);
  return cudaSuccess;
}
API cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) { return cudaSuccess; }

// ---------------------------------------------------------------------------------------------- devices

API cudaError_t cudaGetDeviceCount(int *n) {
  *n = card().present ? 1 : 0;
  return card().present ? cudaSuccess : fail(cudaErrorNoDevice);
}
API cudaError_t cudaGetDevice(int *device) {
  if (!card().present) return fail(cudaErrorNoDevice);
  *device = 0;
  return cudaSuccess;
}
API cudaError_t cudaSetDevice(int device) { return device == 0 && card().present ? (touch_context(), cudaSuccess) : fail(cudaErrorInvalidDevice); }
API cudaError_t cudaInitDevice(int, unsigned, unsigned) { return touch_context(), cudaSuccess; }
API cudaError_t cudaRuntimeGetVersion(int *v) { return *v = 13000, cudaSuccess; }
API cudaError_t cudaDriverGetVersion(int *v) { return *v = 13000, cudaSuccess; }
API cudaError_t cudaGetLastError() {
  cudaError_t e = last_error;
  last_error = cudaSuccess;
  return e;
}
API cudaError_t cudaPeekAtLastError() { return last_error; }
API const char *cudaGetErrorString(cudaError_t e) {
  switch (e) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorNoDevice: return "no CUDA-capable device is detected";
    case cudaErrorNotReady: return "device not ready";
    default: return "emulated error";
  }
}
API const char *cudaGetErrorName(cudaError_t e) { return e == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorEmulated"; }

static int attribute(int which) {
  Card &c = card();
  switch (which) {
    case 1: return 1024;                                   // MaxThreadsPerBlock
    case 2: case 3: return 1024;                           // MaxBlockDimX, Y
    case 4: return 64;
    case 5: return 2147483647;                             // MaxGridDimX
    case 6: case 7: return 65535;
    case 8: return 48 * KIB;                               // MaxSharedMemoryPerBlock
    case 9: return 64 * KIB;                               // TotalConstantMemory
    case 10: return 32;                                    // WarpSize
    case 11: return 2147483647;                            // MaxPitch
    case 12: return 65536;                                 // MaxRegistersPerBlock
    case 13: return 1700000;                               // ClockRate
    case 14: return 512;                                   // TextureAlignment
    case 16: return c.sms;
    case 31: return 1;                                     // ConcurrentKernels
    case 33: return 1;                                     // PciBusId
    case 36: return 7000000;                               // MemoryClockRate
    case 37: return 192;                                   // GlobalMemoryBusWidth
    case 38: return 3 * MIB;                               // L2CacheSize
    case 39: return c.threads_per_sm();
    case 40: return 2;                                     // AsyncEngineCount
    case 41: return 1;                                     // UnifiedAddressing
    case 75: return c.major;
    case 76: return c.minor;
    case 78: return 1;                                     // StreamPrioritiesSupported
    case 79: case 80: return 1;
    case 81: return c.shared_per_sm();
    case 82: return 65536;                                 // MaxRegistersPerMultiprocessor
    case 83: return 1;                                     // ManagedMemory
    case 89: return 1;                                     // ConcurrentManagedAccess
    case 95: return 1;                                     // CooperativeLaunch
    case 97: return c.optin();
    case 102: return 1;                                    // VirtualMemoryManagementSupported
    case 103: return 1;                                    // HandleTypePosixFileDescriptorSupported
    case 106: return c.blocks_per_sm();
    case 111: return KIB;                                  // ReservedSharedMemoryPerBlock
    case 115: return 1;                                    // MemoryPoolsSupported
    default: return 0;
  }
}
API cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr which, int) { return *value = attribute(which), cudaSuccess; }
API cudaError_t cudaGetDeviceProperties(cudaDeviceProp *p, int) {
  Card &c = card();
  memset(p, 0, sizeof *p);
  strncpy(p->name, c.name.c_str(), sizeof p->name - 1);
  for (int i = 0; i < 16; i++) p->uuid.bytes[i] = (char)(i + 1);
  p->totalGlobalMem = c.total;
  p->sharedMemPerBlock = 48 * KIB, p->regsPerBlock = 65536, p->warpSize = 32, p->memPitch = 2147483647;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->totalConstMem = 64 * KIB, p->major = c.major, p->minor = c.minor, p->textureAlignment = 512;
  p->multiProcessorCount = c.sms, p->concurrentKernels = 1, p->pciBusID = 1, p->asyncEngineCount = 2, p->unifiedAddressing = 1;
  p->memoryBusWidth = 192, p->l2CacheSize = 3 * MIB, p->maxThreadsPerMultiProcessor = c.threads_per_sm();
  p->streamPrioritiesSupported = p->globalL1CacheSupported = p->localL1CacheSupported = 1;
  p->sharedMemPerMultiprocessor = c.shared_per_sm(), p->regsPerMultiprocessor = 65536, p->managedMemory = 1;
  p->concurrentManagedAccess = 1, p->cooperativeLaunch = 1, p->sharedMemPerBlockOptin = c.optin();
  p->maxBlocksPerMultiProcessor = c.blocks_per_sm(), p->reservedSharedMemPerBlock = KIB, p->memoryPoolsSupported = 1;
  return cudaSuccess;
}
API cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) { return *least = 0, *greatest = -5, cudaSuccess; }
API cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) { return *can = 0, cudaSuccess; }
API cudaError_t cudaDeviceGetPCIBusId(char *text, int length, int) { return snprintf(text, length, "0000:01:00.0"), cudaSuccess; }
API cudaError_t cudaDeviceSynchronize() {
  COUNT("cudaDeviceSynchronize");
  return cudaSuccess;
}
API cudaError_t cudaMemGetInfo(size_t *free, size_t *total) {
  touch_context();
  COUNT("cudaMemGetInfo");
  std::lock_guard<std::mutex> guard(state().lock);
  *total = card().total;
  *free = left(state());
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- memory

API cudaError_t cudaMalloc(void **p, size_t bytes) {
  COUNT("cudaMalloc");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  size_t whole = (bytes + 2 * MIB - 1) / (2 * MIB) * (2 * MIB);
  if (!whole) return *p = nullptr, cudaSuccess;
  if (!card().present) return fail(cudaErrorNoDevice);
  if (!reserve(s, whole)) return *p = nullptr, fail(cudaErrorMemoryAllocation);
  *p = s.device.take(whole, 2 * MIB);
  return cudaSuccess;
}
API cudaError_t cudaFree(void *p) {
  COUNT("cudaFree");
  if (!p) return touch_context(), cudaSuccess;
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  if (s.managed.holds(p)) {
    s.managed_bytes -= s.managed.give_back(p);
    return cudaSuccess;
  }
  size_t bytes = s.device.give_back(p);
  if (!bytes) return fail(cudaErrorInvalidValue);
  s.used -= bytes;
  return cudaSuccess;
}
API cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t) { return cudaMalloc(p, bytes); }
API cudaError_t cudaFreeAsync(void *p, cudaStream_t) { return cudaFree(p); }
API cudaError_t cudaMallocManaged(void **p, size_t bytes, unsigned) {
  COUNT("cudaMallocManaged");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  size_t whole = (bytes + 64 * KIB - 1) / (64 * KIB) * (64 * KIB);
  *p = s.managed.take(whole, 64 * KIB);
  s.managed_bytes += whole;
  return cudaSuccess;
}
API cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned) {
  COUNT("cudaHostAlloc");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  size_t whole = (bytes + 4 * KIB - 1) / (4 * KIB) * (4 * KIB);
  *p = s.host.take(whole, 4 * KIB);
  s.host_bytes += whole;
  if (s.host_bytes > s.host_peak) s.host_peak = s.host_bytes;
  return cudaSuccess;
}
API cudaError_t cudaMallocHost(void **p, size_t bytes) { return cudaHostAlloc(p, bytes, 0); }
API cudaError_t cudaFreeHost(void *p) {
  COUNT("cudaFreeHost");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  s.host_bytes -= s.host.give_back(p);
  return cudaSuccess;
}
API cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned) {
  COUNT("cudaHostRegister");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  s.registered[(char *)p] = bytes;
  return cudaSuccess;
}
API cudaError_t cudaHostUnregister(void *p) {
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  s.registered.erase((char *)p);
  return cudaSuccess;
}
API cudaError_t cudaHostGetDevicePointer(void **device, void *host, unsigned) { return *device = host, cudaSuccess; }
API cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *a, const void *p) {
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  memset(a, 0, sizeof *a);
  a->device = 0;
  if (s.device.holds(p)) a->type = cudaMemoryTypeDevice, a->devicePointer = (void *)p;
  else if (s.managed.holds(p)) a->type = cudaMemoryTypeManaged, a->devicePointer = a->hostPointer = (void *)p;
  else if (s.host.holds(p)) a->type = cudaMemoryTypeHost, a->devicePointer = a->hostPointer = (void *)p;
  else {
    a->type = cudaMemoryTypeUnregistered, a->hostPointer = nullptr, a->device = -2;
    auto it = s.registered.upper_bound((char *)p);
    if (it != s.registered.begin() && (--it, (char *)p < it->first + it->second))
      a->type = cudaMemoryTypeHost, a->devicePointer = a->hostPointer = (void *)p, a->device = 0;
  }
  return cudaSuccess;
}
API cudaError_t cudaMemcpy(void *to, const void *from, size_t n, cudaMemcpyKind kind) { return copy(to, from, n, kind, true); }
API cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t n, cudaMemcpyKind kind, cudaStream_t) { return copy(to, from, n, kind, false); }
API cudaError_t cudaMemcpyPeerAsync(void *to, int, const void *from, int, size_t n, cudaStream_t) { return copy(to, from, n, cudaMemcpyDeviceToDevice, false); }
API cudaError_t cudaMemcpy2DAsync(void *to, size_t pt, const void *from, size_t pf, size_t w, size_t h, cudaMemcpyKind kind, cudaStream_t) {
  COUNT("cudaMemcpy2DAsync");
  if (w * h <= card().copy_max)
    for (size_t row = 0; row < h; row++) memmove((char *)to + row * pt, (const char *)from + row * pf, w);
  return cudaSuccess;
}
API cudaError_t cudaMemset(void *p, int value, size_t n) {
  COUNT("cudaMemset");
  if (n <= card().copy_max) memset(p, value, n);
  return cudaSuccess;
}
API cudaError_t cudaMemsetAsync(void *p, int value, size_t n, cudaStream_t) {
  COUNT("cudaMemsetAsync");
  if (n <= card().copy_max) memset(p, value, n);
  return cudaSuccess;
}
API cudaError_t cudaMemPrefetchAsync(const void *, size_t, cudaMemLocation, unsigned, cudaStream_t) {
  COUNT("cudaMemPrefetchAsync");
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- streams and events

static std::atomic<unsigned long> next_object{16};
API cudaError_t cudaStreamCreate(cudaStream_t *s) { return *s = (cudaStream_t)(next_object.fetch_add(16)), cudaSuccess; }
API cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned, int) { return cudaStreamCreate(s); }
API cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamSynchronize(cudaStream_t) {
  COUNT("cudaStreamSynchronize");
  return cudaSuccess;
}
API cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
API cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) {
  COUNT("cudaStreamWaitEvent");
  return cudaSuccess;
}
API cudaError_t cudaStreamGetPriority(cudaStream_t, int *p) { return *p = 0, cudaSuccess; }
API cudaError_t cudaStreamIsCapturing(cudaStream_t, cudaStreamCaptureStatus *s) { return *s = cudaStreamCaptureStatusNone, cudaSuccess; }
API cudaError_t cudaStreamGetCaptureInfo(cudaStream_t, cudaStreamCaptureStatus *s, unsigned long long *id, cudaGraph_t *g,
                                         const cudaGraphNode_t **d, const cudaGraphEdgeData **e, size_t *n) {
  *s = cudaStreamCaptureStatusNone;
  if (id) *id = 0;
  if (g) *g = nullptr;
  if (d) *d = nullptr;
  if (e) *e = nullptr;
  if (n) *n = 0;
  return cudaSuccess;
}
API cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
API cudaError_t cudaEventCreateWithFlags(cudaEvent_t *e, unsigned) { return *e = (cudaEvent_t)calloc(1, sizeof(double)), cudaSuccess; }
API cudaError_t cudaEventCreate(cudaEvent_t *e) { return cudaEventCreateWithFlags(e, 0); }
API cudaError_t cudaEventDestroy(cudaEvent_t e) { return free(e), cudaSuccess; }
API cudaError_t cudaEventRecord(cudaEvent_t e, cudaStream_t) {
  COUNT("cudaEventRecord");
  *(double *)e = seconds();
  return cudaSuccess;
}
API cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned) { return cudaEventRecord(e, s); }
API cudaError_t cudaEventQuery(cudaEvent_t) { return cudaSuccess; }
API cudaError_t cudaEventSynchronize(cudaEvent_t) {
  COUNT("cudaEventSynchronize");
  return cudaSuccess;
}
API cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t a, cudaEvent_t b) {
  *ms = (float)(1e3 * (*(double *)b - *(double *)a));
  return cudaSuccess;
}

// ---------------------------------------------------------------------------------------------- the driver

API CUresult cuInit(unsigned) { return card().present ? CUDA_SUCCESS : CUDA_ERROR_NO_DEVICE; }
API CUresult cuDriverGetVersion(int *v) { return *v = 13000, CUDA_SUCCESS; }
API CUresult cuDeviceGet(CUdevice *d, int) { return *d = 0, CUDA_SUCCESS; }
API CUresult cuDeviceGetCount(int *n) { return *n = card().present, CUDA_SUCCESS; }
API CUresult cuDeviceGetName(char *text, int length, CUdevice) { return snprintf(text, length, "%s", card().name.c_str()), CUDA_SUCCESS; }
API CUresult cuDeviceTotalMem_v2(size_t *n, CUdevice) { return *n = card().total, CUDA_SUCCESS; }
API CUresult cuDeviceGetAttribute(int *v, CUdevice_attribute which, CUdevice) { return *v = attribute(which), CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned *flags, int *active) { return *flags = 0, *active = state().context, CUDA_SUCCESS; }
API CUresult cuDevicePrimaryCtxRetain(CUcontext *c, CUdevice) { return touch_context(), *c = (CUcontext)0x1000, CUDA_SUCCESS; }
API CUresult cuCtxGetCurrent(CUcontext *c) { return *c = state().context ? (CUcontext)0x1000 : nullptr, CUDA_SUCCESS; }
API CUresult cuCtxSetCurrent(CUcontext) { return CUDA_SUCCESS; }
API CUresult cuCtxGetDevice(CUdevice *d) { return *d = 0, CUDA_SUCCESS; }
API CUresult cuGetErrorString(CUresult e, const char **text) { return *text = e == CUDA_ERROR_OUT_OF_MEMORY ? "out of memory" : "emulated error", CUDA_SUCCESS; }
API CUresult cuGetErrorName(CUresult, const char **text) { return *text = "CUDA_ERROR_EMULATED", CUDA_SUCCESS; }
API CUresult cuLaunchKernel(CUfunction f, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CUstream, void **, void **) {
  COUNT("cuLaunchKernel");
  return CUDA_SUCCESS;
}
// Triton's: a function is known by its name, and counted as a kernel of the runtime is.
API CUresult cuModuleGetFunction(CUfunction *f, CUmodule, const char *name) {
  static std::map<std::string, Function *> functions;
  Census &c = census();
  std::lock_guard<std::mutex> guard(c.lock);
  Function *&function = functions[name];
  if (!function) (function = new Function)->name = name;
  c.functions[function] = function;
  return *f = (CUfunction)function, CUDA_SUCCESS;
}
API CUresult cuFuncGetAttribute(int *v, CUfunction_attribute which, CUfunction) { return *v = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0, CUDA_SUCCESS; }
API CUresult cuLaunchKernelEx(const CUlaunchConfig *, CUfunction f, void **, void **) { return launched((const void *)f), CUDA_SUCCESS; }
API CUresult cuCtxGetLimit(size_t *n, CUlimit) { return *n = MIB, CUDA_SUCCESS; }
API CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
API CUresult cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr p) {
  if (which == CU_POINTER_ATTRIBUTE_CONTEXT) *(CUcontext *)data = (CUcontext)0x1000;
  else if (which == CU_POINTER_ATTRIBUTE_MEMORY_TYPE) *(unsigned *)data = state().device.holds((void *)p) ? CU_MEMORYTYPE_DEVICE : CU_MEMORYTYPE_HOST;
  else *(int *)data = 0;
  return CUDA_SUCCESS;
}
API CUresult cuMemGetAllocationGranularity(size_t *n, const CUmemAllocationProp *, CUmemAllocationGranularity_flags) { return *n = 2 * MIB, CUDA_SUCCESS; }
API CUresult cuMemAddressReserve(CUdeviceptr *p, size_t bytes, size_t, CUdeviceptr, unsigned long long) {
  COUNT("cuMemAddressReserve");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  *p = (CUdeviceptr)s.device.take(bytes, 2 * MIB);
  return *p ? CUDA_SUCCESS : CUDA_ERROR_OUT_OF_MEMORY;
}
API CUresult cuMemAddressFree(CUdeviceptr p, size_t) {
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  s.device.give_back((void *)p);
  return CUDA_SUCCESS;
}
API CUresult cuMemCreate(CUmemGenericAllocationHandle *h, size_t bytes, const CUmemAllocationProp *, unsigned long long) {
  COUNT("cuMemCreate");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  if (!reserve(s, bytes)) return CUDA_ERROR_OUT_OF_MEMORY;
  *h = s.next_handle++;
  s.handles[*h] = bytes;
  return CUDA_SUCCESS;
}
API CUresult cuMemRelease(CUmemGenericAllocationHandle h) {
  COUNT("cuMemRelease");
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  auto it = s.handles.find(h);
  if (it == s.handles.end()) return CUDA_ERROR_INVALID_VALUE;
  s.used -= it->second;
  s.handles.erase(it);
  return CUDA_SUCCESS;
}
API CUresult cuMemMap(CUdeviceptr, size_t, size_t, CUmemGenericAllocationHandle, unsigned long long) { return CUDA_SUCCESS; }
API CUresult cuMemUnmap(CUdeviceptr p, size_t bytes) {
  madvise((void *)p, bytes, MADV_DONTNEED);
  return CUDA_SUCCESS;
}
API CUresult cuMemSetAccess(CUdeviceptr, size_t, const CUmemAccessDesc *, size_t) { return CUDA_SUCCESS; }
API CUresult cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *size, CUdeviceptr p) {
  State &s = state();
  std::lock_guard<std::mutex> guard(s.lock);
  auto it = s.device.taken.upper_bound((size_t)((char *)p - s.device.base));
  if (it == s.device.taken.begin()) return CUDA_ERROR_INVALID_VALUE;
  --it;
  if (base) *base = (CUdeviceptr)(s.device.base + it->first);
  if (size) *size = it->second;
  return CUDA_SUCCESS;
}
static long unknown_driver_function() {
  emu_stub("a driver function without a stand-in");
  return 0;
}
static void *driver_function(const char *symbol) {
  Dl_info about;
  static void *self = dladdr((void *)&cuInit, &about) ? dlopen(about.dli_fname, RTLD_LAZY | RTLD_NOLOAD) : nullptr;
  void *found = nullptr;
  for (const char *suffix : {"_v3", "_v2", ""}) {
    std::string name = std::string(symbol) + suffix;
    if (self && (found = dlsym(self, name.c_str()))) break;
  }
  if (!found) {
    if (getenv("EMU_TRACE")) fprintf(stderr, "emucuda: driver function asked for: %s\n", symbol);
    found = (void *)&unknown_driver_function;
  }
  return found;
}
API cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **p, unsigned, unsigned long long, cudaDriverEntryPointQueryResult *r) {
  *p = driver_function(symbol);
  if (r) *r = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}
API cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **p, unsigned long long f, cudaDriverEntryPointQueryResult *r) {
  return cudaGetDriverEntryPointByVersion(symbol, p, 13000, f, r);
}
API CUresult cuGetProcAddress_v2(const char *symbol, void **p, int, cuuint64_t, CUdriverProcAddressQueryResult *r) {
  *p = driver_function(symbol);
  if (r) *r = CU_GET_PROC_ADDRESS_SUCCESS;
  return CUDA_SUCCESS;
}
