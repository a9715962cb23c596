/* What net_name.js calls: the network with an image, a result and an arena of its own. */

#include "net_name.h"

static float image[NET_NAME_INPUTS], result[NET_NAME_OUTPUTS];
static _Alignas(64) unsigned char arena[NET_NAME_ARENA_BYTES];

__attribute__((export_name("image"))) float *image_place(void) { return image; }
__attribute__((export_name("result"))) float *result_place(void) { return result; }
__attribute__((export_name("run"))) int run(void) { return net_name_run(image, result, arena); }
