// nfpm makes the .deb and .rpm packages (deploy/nfpm.yaml). A module of its own keeps its
// dependencies out of the product's.
module github.com/streamshim/streamshim/test/tools/nfpm

go 1.26.6
