"""Names that classes may have, whoever named them, and that some part of a program would read as something else."""

LOOK_ALIKE = ("caf\u00e9", "cafe\u0301")  # NFC and NFD: two names, one look
PLAIN = (  # as a folder may be called, too
    "${x}", "${oc.env:HOME}", "???", "null", "~", "yes", "off", "true", "1e3", "0x10", "1:30", "2020-01-01", ".nan",
    "a: b", "- a", "#c", "'", '"', "\\", "\\n", "{a}", "[b", "%d", "@a", "`b", "!!str", "*a", "&a", "|", ">", "<<", "=",
    "=1+1", "<b>&amp;</b>", "</script>", "a,b", "a;b", "\U0001f408", "\u05e9\u05dc\u05d5\u05dd", "abc\u202ecba",
    "a\u200bb", "\u2028", "x" * 80, "nan", "None", "...", "---", "%YAML 1.2", *LOOK_ALIKE,
)  # fmt: skip
ODD = (*PLAIN, "a\nb", "a\rb", "a\tb", "a\x00b", "a\x1bb", "a\x85b", "\ufeffa", "w" * 256)  # as a label of a tar may be
