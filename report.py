"""placeholder"""


def results_table(runs):
    return ""


def write(root, out):
    out.write_text("x")
