/* A management library with two cards, to hold our bindings against a C compiler's idea of the calls. */
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory_t;
static const char *names[] = {"NVIDIA H200", "NVIDIA A100"};
static int cards[2];
int nvmlInit_v2(void) { return FAIL_INIT; }
int nvmlShutdown(void) { return 0; }
int nvmlSystemGetDriverVersion(char *text, unsigned n) { strncpy(text, "570.86.15", n); return 0; }
int nvmlSystemGetCudaDriverVersion_v2(int *version) { *version = 12080; return 0; }
int nvmlDeviceGetCount_v2(unsigned *n) { *n = 2; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned at, void **card) { *card = &cards[at]; return at > 1; }
int nvmlDeviceGetName(void *card, char *text, unsigned n) { strncpy(text, names[(int *)card - cards], n); return 0; }
int nvmlDeviceGetUUID(void *card, char *text, unsigned n) { strncpy(text, "GPU-12", n); return 0; }
int nvmlDeviceGetMemoryInfo(void *card, memory_t *m) { m->total = 150754820096ull; m->used = 1ull << 33; m->free = 7; return 0; }
int nvmlDeviceGetCudaComputeCapability(void *card, int *a, int *b) { *a = card == cards ? 9 : 8; *b = 0; return 0; }
int nvmlDeviceGetMigMode(void *card, unsigned *now, unsigned *then) { *now = 1; return card == cards ? 3 : 0; }
