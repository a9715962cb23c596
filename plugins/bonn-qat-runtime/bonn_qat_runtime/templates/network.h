/* TITLE */

#ifndef NET_NAME_H
#define NET_NAME_H

#ifdef __cplusplus
extern "C" {
#endif

DEFINES

/* image (NET_NAME_INPUTS), float32 (channels, height, width) -> result (NET_NAME_OUTPUTS). The arena has
   NET_NAME_ARENA_BYTES bytes, begins at a multiple of 64, and may hold anything; threads that run at once have one each.
   Returns 0, or 6 for an arena that begins elsewhere. Allocates nothing, keeps nothing. */
int net_name_run(const float *image, float *result, void *arena);

#ifdef __cplusplus
}
#endif

#endif
