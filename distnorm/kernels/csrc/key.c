/* Which build this is: the key that distnorm/kernels/library_cache.py compiled it under. */

#define TEXT(word) #word
#define TEXT_OF(macro) TEXT(macro)

const char *distnorm_key(void)
{
    return TEXT_OF(DISTNORM_KEY);
}
