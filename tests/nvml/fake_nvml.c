/* Copyright: llmfleet developers
 * GNU General Public License v3.0+ (see LICENSE)
 *
 * A stand-in for libnvidia-ml.so.1, NVIDIA's library: plays the cards of the file that FAKE_NVML names.
 *
 *     cc -shared -fPIC -o libnvidia-ml.so.1 fake_nvml.c        as a driver of branch 510 or newer
 *     cc -DOLD_DRIVER ...                                      as an older one, without the _v2 and _v3 functions
 *
 * The file has a line for each fact, key=value. First those of the driver, then those of each card after a line [gpu],
 * which those of its MIG instances follow, each after a line [mig]:
 *
 *     driver=580.159.04                              cuda=13000
 *     [gpu]
 *     uuid=GPU-..   name=NVIDIA H200   bus=00000000:06:00.0   capability=9.0
 *     total=, reserved=, free=                       bytes, with reserved as a part of total
 *     mig=1                                          0 or 1; without it the card does not know MIG
 *     compute=4711 1048576 /usr/bin/python3          pid, bytes or - for unknown, program (- for one that has ended);
 *     graphics=...                                   any number of both
 *     nvlink=1 2 3                                   the cards that it is linked to
 *     [mig]
 *     slot=0, uuid=, name=, total=, reserved=, free=
 *
 * error.FUNCTION=15 anywhere has that function return this error there, and error=15 each function. What a card has no
 * line for, it does not support. As the real one, it crashes when it is handed a device that it has not handed out.
 */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7,
    VERSION_MISMATCH = 25
};
enum { LINES = 512, WIDTH = 256, SECTIONS = 64 };

typedef struct section { int is_mig, index, parent, first, last; } section; /* lines first..last-1 */

/* As in nvml.h. */
typedef struct { unsigned long long total, free, used; } memory_v1;
typedef struct { unsigned version; unsigned long long total, reserved, free, used; } memory_v2;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, compute_instance; } process;
typedef struct {
    char legacy_bus_id[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
} pci_info;

static char lines[LINES][WIDTH];
static section sections[SECTIONS]; /* 0 is the driver */
static int line_count, section_count, started;

static void load(void)
{
    const char *path = getenv("FAKE_NVML");
    FILE *file = path ? fopen(path, "r") : NULL;
    int gpus = 0, gpu = 0;

    if (!file) {
        fprintf(stderr, "FAKE_NVML names no file\n");
        abort();
    }
    line_count = 0;
    section_count = 1;
    sections[0] = (section){0};
    while (line_count < LINES && section_count < SECTIONS && fgets(lines[line_count], WIDTH, file)) {
        char *line = lines[line_count];
        line[strcspn(line, "\n")] = '\0';
        if (line[0] == '[') {
            section *new = &sections[section_count];
            *new = (section){.is_mig = !strcmp(line, "[mig]"), .first = line_count, .last = line_count};
            if (new->is_mig)
                new->parent = gpu;
            else
                new->index = gpus++, gpu = section_count;
            section_count++;
        }
        sections[section_count - 1].last = ++line_count;
    }
    fclose(file);
}

/* The value of a key in a section, the nth if it is there more than once. */
static const char *nth(const section *in, const char *key, int n)
{
    size_t length = strlen(key);
    for (int i = in->first; i < in->last; i++)
        if (!strncmp(lines[i], key, length) && lines[i][length] == '=' && n-- == 0)
            return lines[i] + length + 1;
    return NULL;
}

static const char *get(const section *in, const char *key) { return nth(in, key, 0); }

static unsigned long long number(const section *in, const char *key)
{
    const char *text = get(in, key);
    return text ? strtoull(text, NULL, 10) : 0;
}

static int failure(const section *in, const char *function)
{
    char key[WIDTH];
    if (!started)
        return UNINITIALIZED;
    if (in < sections || in >= sections + section_count || ((char *)in - (char *)sections) % sizeof(section))
        abort();
    snprintf(key, sizeof key, "error.%s", function);
    return get(in, key) ? (int)number(in, key) : (int)number(in, "error");
}

#define BEGIN(in) \
    do { \
        int failed = failure((in), __func__); \
        if (failed) \
            return failed; \
    } while (0)

static int copy(const char *value, char *to, unsigned size)
{
    if (!value)
        return NOT_SUPPORTED;
    if (strlen(value) >= size)
        return INSUFFICIENT_SIZE;
    strcpy(to, value);
    return SUCCESS;
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    load();
    started = 1;
    int failed = failure(sections, __func__);
    started = !failed;
    return failed;
}

int nvmlShutdown(void)
{
    const char *record = getenv("FAKE_NVML_SHUTDOWN");
    BEGIN(sections);
    started = 0;
    if (record)
        fclose(fopen(record, "w"));
    return SUCCESS;
}

int nvmlSystemGetDriverVersion(char *version, unsigned size)
{
    BEGIN(sections);
    return copy(get(sections, "driver"), version, size);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    BEGIN(sections);
    *version = (int)number(sections, "cuda");
    return *version ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    BEGIN(sections);
    *count = 0;
    for (int i = 1; i < section_count; i++)
        *count += !sections[i].is_mig;
    return SUCCESS;
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, section **device)
{
    for (int i = 1; i < section_count; i++)
        if (!sections[i].is_mig && sections[i].index == (int)index) {
            BEGIN(&sections[i]);
            *device = &sections[i];
            return SUCCESS;
        }
    return INVALID_ARGUMENT;
}

int nvmlDeviceGetPciInfo_v3(section *device, pci_info *info)
{
    BEGIN(device);
    memset(info, 0, sizeof *info);
    if (copy(get(device, "bus"), info->bus_id, sizeof info->bus_id))
        return NOT_SUPPORTED;
    /* With a domain of four digits, as before there were eight. */
    snprintf(info->legacy_bus_id, sizeof info->legacy_bus_id, "%s", info->bus_id + 4);
    sscanf(info->bus_id, "%x:%x:%x", &info->domain, &info->bus, &info->device);
    return SUCCESS;
}

int nvmlDeviceGetName(section *device, char *name, unsigned size)
{
    BEGIN(device);
    return copy(get(device, "name"), name, size);
}

int nvmlDeviceGetUUID(section *device, char *uuid, unsigned size)
{
    BEGIN(device);
    return copy(get(device, "uuid"), uuid, size);
}

int nvmlDeviceGetCudaComputeCapability(section *device, int *major, int *minor)
{
    BEGIN(device);
    const char *text = get(device, "capability");
    return text && sscanf(text, "%d.%d", major, minor) == 2 ? SUCCESS : NOT_SUPPORTED;
}

int nvmlDeviceGetMemoryInfo(section *device, memory_v1 *memory)
{
    BEGIN(device);
    if (!get(device, "total"))
        return NOT_SUPPORTED;
    memory->total = number(device, "total");
    memory->free = number(device, "free");
#ifdef OLD_DRIVER
    memory->total -= number(device, "reserved"); /* nobody was told of it */
#endif
    memory->used = memory->total - memory->free;
    return SUCCESS;
}

int nvmlDeviceGetMigMode(section *device, unsigned *current, unsigned *pending)
{
    BEGIN(device);
    if (!get(device, "mig"))
        return NOT_SUPPORTED;
    *current = *pending = (unsigned)number(device, "mig");
    return SUCCESS;
}

int nvmlDeviceGetMaxMigDeviceCount(section *device, unsigned *count)
{
    BEGIN(device);
    *count = get(device, "mig") ? 7 : 0;
    return SUCCESS;
}

int nvmlDeviceGetMigDeviceHandleByIndex(section *device, unsigned slot, section **instance)
{
    BEGIN(device);
    for (int i = 1; i < section_count; i++)
        if (sections[i].is_mig && &sections[sections[i].parent] == device && number(&sections[i], "slot") == slot) {
            *instance = &sections[i];
            return SUCCESS;
        }
    return NOT_FOUND;
}

int nvmlDeviceGetP2PStatus(section *one, section *other, unsigned capability, int *status)
{
    const char *peers;
    BEGIN(one);
    BEGIN(other);
    *status = one == other ? 0 : 5; /* a card reaches itself; not supported */
    if (capability == 2 && (peers = get(one, "nvlink"))) { /* NVLink */
        char *end;
        for (long peer = strtol(peers, &end, 10); end != peers; peers = end, peer = strtol(peers, &end, 10))
            if (peer == other->index)
                *status = 0;
    }
    return SUCCESS;
}

#ifndef OLD_DRIVER
int nvmlDeviceGetMemoryInfo_v2(section *device, memory_v2 *memory)
{
    BEGIN(device);
    if (memory->version != (sizeof *memory | 2u << 24))
        return VERSION_MISMATCH;
    if (!get(device, "total"))
        return NOT_SUPPORTED;
    memory->total = number(device, "total");
    memory->reserved = number(device, "reserved");
    memory->free = number(device, "free");
    memory->used = memory->total - memory->reserved - memory->free;
    return SUCCESS;
}

static int processes(section *device, const char *kind, unsigned *count, process *to)
{
    unsigned there = 0, room = *count;
    const char *text;

    for (; (text = nth(device, kind, (int)there)); there++)
        if (to && there < room) {
            char bytes[32] = "";
            to[there] = (process){.gpu_instance = ~0u, .compute_instance = ~0u, .used = ~0ull}; /* not available */
            sscanf(text, "%u %31s", &to[there].pid, bytes);
            if (strcmp(bytes, "-"))
                to[there].used = strtoull(bytes, NULL, 10);
        }
    *count = there;
    return there > room ? INSUFFICIENT_SIZE : SUCCESS;
}

int nvmlDeviceGetComputeRunningProcesses_v3(section *device, unsigned *count, process *to)
{
    BEGIN(device);
    return processes(device, "compute", count, to);
}

int nvmlDeviceGetGraphicsRunningProcesses_v3(section *device, unsigned *count, process *to)
{
    BEGIN(device);
    return processes(device, "graphics", count, to);
}
#endif

int nvmlSystemGetProcessName(unsigned pid, char *name, unsigned size)
{
    BEGIN(sections);
    for (int i = 0; i < line_count; i++) {
        char *text = strchr(lines[i], '=');
        unsigned found;
        int at = 0;
        if (!text || (strncmp(lines[i], "compute=", 8) && strncmp(lines[i], "graphics=", 9)))
            continue;
        if (sscanf(text + 1, "%u %*s %n", &found, &at) == 1 && at && found == pid)
            return strcmp(text + 1 + at, "-") ? copy(text + 1 + at, name, size) : NOT_FOUND;
    }
    return NOT_FOUND;
}
