from pagecore.page_source._protocol cimport (
    ANSWER_CONTINUE,
    ANSWER_END,
    ANSWER_FAILED,
    ANSWER_FILL,
    ANSWER_GONE,
    ANSWER_PAGES,
    ANSWER_SENT,
    ANSWER_STOPPED,
    ANSWER_ZEROS,
    AnswerKind,
    PageAnswer,
    PageSource,
)
