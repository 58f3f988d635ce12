#include <secateur.h>

extern int header_is_c90(secateur_status status);
int header_is_c90(secateur_status status) { return status == SECATEUR_OK; }
