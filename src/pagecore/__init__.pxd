from pagecore._bitmap cimport Bitmap
from pagecore._uffd cimport Region, Userfaultfd
