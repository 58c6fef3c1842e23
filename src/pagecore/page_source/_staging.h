/* A buffer of its own for each thread that fetches pages: resident, never registered, never a mapping of a file (D5). */
#ifndef PAGECORE_STAGING_H
#define PAGECORE_STAGING_H

#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef struct {
    size_t size;
    uint8_t *bytes;
} pagecore_staging;

static pthread_key_t pagecore_staging_key;
static int pagecore_staging_state = -1; /* 0 once the key exists, else the error of making it */
static pthread_once_t pagecore_staging_once = PTHREAD_ONCE_INIT;

static void pagecore_staging_free(void *memory)
{
    free(((pagecore_staging *)memory)->bytes);
    free(memory);
}

static void pagecore_staging_make_key(void)
{
    pagecore_staging_state = pthread_key_create(&pagecore_staging_key, pagecore_staging_free);
}

/* At least `size` bytes, aligned to pages, of the calling thread; valid until its next call, freed when it ends. NULL: no
 * memory. Where a source asks for the same sizes again and again, as they do, this allocates once for each thread. */
static inline uint8_t *pagecore_staging_get(size_t size)
{
    pagecore_staging *own;
    void *bytes;
    pthread_once(&pagecore_staging_once, pagecore_staging_make_key);
    if (pagecore_staging_state != 0)
        return NULL;
    own = (pagecore_staging *)pthread_getspecific(pagecore_staging_key);
    if (own == NULL) {
        own = (pagecore_staging *)calloc(1, sizeof(*own));
        if (own == NULL)
            return NULL;
        if (pthread_setspecific(pagecore_staging_key, own) != 0) {
            free(own);
            return NULL;
        }
    }
    if (own->size < size) {
        if (posix_memalign(&bytes, 4096, size) != 0)
            return NULL;
        free(own->bytes);
        own->bytes = (uint8_t *)bytes;
        own->size = size;
    }
    return own->bytes;
}

#endif
