from pagecore.page_source._protocol cimport AnswerKind, PageAnswer, PageSource
