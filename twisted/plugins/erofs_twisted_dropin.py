from twisted.application.service import ServiceMaker

erofs_nbd = ServiceMaker(
    "erofs-nbd",
    "erofs_twisted.tap",
    "Mount an OCI image from its registry, lazily, on EROFS.",
    "erofs-nbd",
)
