from typing_extensions import Buffer

from pagecore._bitmap import Bitmap

def discard_pages(memory: Buffer, pages: Bitmap, page_size: int = 4096) -> None: ...
