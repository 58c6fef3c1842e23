/* A page number from Python, without a call for the ints that nearly all of them are. */
#ifndef PAGECORE_SMALL_INT_H
#define PAGECORE_SMALL_INT_H

#include <Python.h>

/* The value of an int of one digit that is not negative, else -1: ask PyNumber_AsSsize_t. */
static inline Py_ssize_t pagecore_small_int(PyObject *number)
{
    if (!PyLong_CheckExact(number))
        return -1;
#if PY_VERSION_HEX >= 0x030c0000
    return PyUnstable_Long_IsCompact((PyLongObject *)number) ? PyUnstable_Long_CompactValue((PyLongObject *)number)
                                                             : -1;
#else
    return Py_SIZE(number) == 1 ? (Py_ssize_t)((PyLongObject *)number)->ob_digit[0] : -1;
#endif
}

#endif
