def compiled_isas() -> list[str]: ...
def available_isas() -> list[str]: ...
def active_isa() -> str: ...
def forced_isa() -> str: ...
def set_isa(name: str) -> None: ...
def pool_squares(count: int, threads: int, fail_at: int = -1, lengthy: bool = False) -> list[int]: ...
def eigvalsh(
    a: tuple[int, list[int], list[int], int],
    values: tuple[int, list[int], list[int], int],
    threads: int,
    route: int = 0,
) -> tuple[int, int]: ...
def moments(
    x: tuple[int, list[int], list[int], int],
    centred: bool,
    solve: bool,
    result: tuple[int, list[int], list[int], int],
    raw: int,
    info: tuple[int, int, int, int],
    threads: int,
    route: int = 0,
) -> tuple[int, int]: ...
def eigvalsh_plain(
    a: int,
    fp64: bool,
    batch: int,
    d: int,
    batch_stride: int,
    row_stride: int,
    column_stride: int,
    values: int,
    threads: int,
) -> tuple[int, int]: ...
def left_out_moments(
    x: tuple[int, list[int], list[int], int],
    groups: int,
    values: int,
    raw: int,
    info: tuple[int, int, int, int],
    threads: int,
) -> tuple[int, int] | None: ...
def refine(
    x: tuple[int, list[int], list[int], int],
    at: int,
    batch: int,
    centred: bool,
    stage: tuple[int, float],
    results: list[int],
    info: tuple[int, int, int, int],
    threads: int,
) -> tuple[int, int]: ...
def refined_moments(
    x: tuple[int, list[int], list[int], int],
    limits: tuple[float, float],
    results: tuple[int, int],
    info: tuple[int, int, int, int],
    second: list[list[int]],
    threads: int,
) -> tuple[int, int] | None: ...
def effective_ranks(
    x: tuple[int, list[int], list[int], int],
    centred: bool,
    variance: bool,
    rank: int,
    scratch: int,
    threads: int,
) -> tuple[int, int, float]: ...
def eigvalsh_workspace(fp64: bool, batch: int, d: int) -> int: ...
def residual_mlp_use_library(
    sgemm: int, set_threads: int, pack_size: int = 0, pack: int = 0, compute: int = 0
) -> bool: ...
def residual_mlp_forward(block: tuple[int | float, ...], y: int, threads: int, by_library: bool) -> None: ...
def residual_mlp_backward(
    block: tuple[int | float, ...], dy: int, gradients: list[int], threads: int, by_library: bool
) -> None: ...
def residual_stack_floats(width: int, hidden: list[int], addresses: list[int], rows_in_all: int) -> int: ...
def residual_stack_pack(
    width: int, hidden: list[int], addresses: list[int], rows_in_all: int, packed: int, threads: int
) -> None: ...
def residual_stack_forward(
    rows: int,
    rows_in_all: int,
    width: int,
    hidden: list[int],
    addresses: list[int],
    norm: int,
    activation: int,
    scale: float,
    eps: float,
    packed: int,
    x: int,
    x_stride: int,
    outputs: int,
    step: int,
    threads: int,
) -> None: ...
def residual_mlp_activation(
    activation: int, count: int, input: int, values: int, slopes: int = 0
) -> None: ...
def cka_workspace(
    layers: list[tuple[int, list[int], list[int], int]],
    pairs: list[tuple[int, int]],
    by_features: bool,
    single: bool,
    groups: int,
    threads: int,
) -> int: ...
def cka_products(
    layers: list[tuple[int, list[int], list[int], int]],
    pairs: list[tuple[int, int]],
    by_features: bool,
    single: bool,
    groups: int,
    threads: int,
    centered: tuple[int, list[int], list[int], int],
    u_centered: tuple[int, list[int], list[int], int],
    trace: tuple[int, list[int], list[int], int],
    grand: tuple[int, list[int], list[int], int],
    workspace: tuple[int, list[int], list[int], int],
) -> bool: ...
def moments_add(
    rows: list[tuple[int, list[int], list[int], int]],
    shifts: list[int],
    units: list[float],
    keep: tuple[int, int, int],
    pairs: list[tuple[int, int, int]],
    threads: int,
) -> None: ...

class CudaDriver:
    def __init__(self, path: str, image: bytes, holds: str, release: tuple[int, int]) -> None: ...
    def same_process(self) -> None: ...
    def version(self) -> int: ...
    def device_count(self) -> int: ...
    def device_name(self, device: int) -> str: ...
    def capability(self, device: int) -> tuple[int, int]: ...
    def multiprocessors(self, device: int) -> int: ...
    def shared_bytes(self, device: int) -> int: ...
    def single_to_double(self, device: int) -> int: ...
    def capturing(self, device: int, stream: int) -> bool: ...
    def resources(self, device: int, kernel: str) -> tuple[int, int, int, int]: ...
    def check(
        self, kernel: str, device: int, grid: tuple[int, int, int], block: int, shared: int, cluster: int
    ) -> None: ...
    def launch(
        self,
        kernel: str,
        device: int,
        stream: int,
        grid: tuple[int, int, int],
        block: int,
        shared: int,
        cluster: int,
        arguments: list[int | float],
    ) -> None: ...
